"""In which arithmetic an evaluation computes, and what the networks take instead."""

from collections import Counter
from contextlib import suppress
from itertools import chain

import torch
from torch import nn

from redefense.ensembles import Ensemble, Independent, evaluating
from redefense.networks import Asked
from redefense.types import Images


def computed_in(ensemble: Ensemble, x: Images) -> tuple[Ensemble, Images]:
    """Networks and images as attacks meet them: in single precision, or double if that is given.

    Steps of an attack are lost in half precision. Networks that take another type than the images
    are given them in theirs, as a deployed network of half precision rounds its input.

    Returns:
        The ensemble, with such networks wrapped, and the images.
    """
    at = x.to(torch.promote_types(x.dtype, torch.float32))
    if not isinstance(ensemble, Independent):
        return ensemble, at
    members = [ensemble.member(m) for m in range(ensemble.num_members)]
    taken = [_taken(network, at, x.dtype) for network in members]
    if at.dtype == torch.float64 and all(dtype == torch.float32 for dtype in taken):
        return ensemble, at.float()
    if all(dtype == at.dtype for dtype in taken):
        return ensemble, at
    wrapped = [
        network if dtype == at.dtype else _wrapped(network, dtype)
        for network, dtype in zip(members, taken, strict=True)
    ]
    found = Independent(wrapped, ensemble.mixture)
    found.origin = ensemble.origin
    return found, at


def _wrapped(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    wrapper = Asked(network, dtype)
    wrapper.training = network.training
    return wrapper


def _taken(network: nn.Module, x: Images, given: torch.dtype) -> torch.dtype:
    """The type in which a network takes images: theirs, else its weights', else the given one.

    Theirs, too, for a network that takes none: what it raises is told later. It is asked only where
    its weights are of other types.
    """
    values = chain(network.parameters(), network.buffers())
    own = Counter(value.dtype for value in values if value.is_floating_point())
    if own.keys() <= {x.dtype}:
        return x.dtype
    for dtype in dict.fromkeys((x.dtype, *(dtype for dtype, _ in own.most_common()), given)):
        with suppress(Exception), torch.no_grad(), evaluating(network):  # may raise anything
            network(x[:1].to(dtype))
            return dtype
    return x.dtype

"""In which arithmetic an evaluation computes, and what networks and attacks take instead."""

from collections import Counter
from contextlib import suppress
from itertools import chain
from typing import Final, Literal

import torch
from torch import Tensor, nn

from redefense.attacks.base import input_gradient
from redefense.ensembles import Ensemble, Independent, evaluating, frozen_weights
from redefense.evaluation.pass_counter import MemberOf
from redefense.evaluation.suite import AttackPrecision
from redefense.networks import Asked
from redefense.threat import TINY
from redefense.types import Float, Images, Logits

NEAR: Final = 0.06
"""Answers whose two largest logits are closer, in standard deviations of the image's logits, are
computed again in full precision. On a robust ResNet-8 bfloat16 moved logits by half of this."""

PIXELS: Final = 1024
"""Numbers in an image from which on bfloat16 is faster; smaller networks wait for its casts."""

SAMPLE: Final = 32
"""Images on which the two arithmetics are compared."""


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


class InBfloat16(Ensemble):
    """An ensemble as attacks may ask it: in bfloat16 wherever that cannot change who is right.

    Gradients are those of bfloat16. Answers near a decision boundary are computed again in full
    precision, so that an attack keeps the points that it would be judged by.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__(ensemble.num_members, ensemble.mixture)
        self.ensemble = ensemble

    def logits_of(self, m: int, x: Images) -> Logits:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.ensemble.logits_of(m, x).to(x.dtype)
        rows = (gap(logits) < NEAR).nonzero().flatten()
        if len(rows) == 0:
            return logits
        with torch.no_grad():
            shift = self.ensemble.logits_of(m, x.detach()[rows]) - logits[rows]
        return logits.index_add(0, rows, shift)

    def member(self, m: int) -> nn.Module:
        return MemberOf(self, m)


def gap(logits: Logits) -> Float[Tensor, " B"]:
    """How far apart the two largest logits are, in standard deviations of an image's logits."""
    top = logits.detach().topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]) / logits.detach().std(1).clamp_min(TINY)


def asked_in(precision: AttackPrecision, ensemble: Ensemble) -> Ensemble:
    """The ensemble as attacks that know it ask it."""
    return InBfloat16(ensemble) if precision == "bf16" else ensemble


def attack_precision(
    wanted: AttackPrecision, ensemble: Ensemble, x: Images
) -> Literal["fp32", "bf16"]:
    """What is meant by "auto": bfloat16 where it is faster and agrees, else single precision.

    It is faster where the processor computes in it and images are not small. It agrees where, on
    the first images, no logit moves by half of `NEAR` or more, and where the gradients of the
    largest logit point the same way (cosine 0.9 on average, for every member).
    """
    if wanted != "auto":
        return wanted
    if x.dtype != torch.float32 or x[0].numel() < PIXELS or not _computes_bfloat16(x.device):
        return "fp32"
    x = x[:SAMPLE]
    for m in range(ensemble.num_members):
        full, slope = _answer(ensemble, m, x)
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            half, coarse = _answer(ensemble, m, x)
        moved = (half - full).abs().amax(1) / full.std(1).clamp_min(TINY)
        alike = torch.cosine_similarity(slope, coarse, dim=1).mean()
        if not (bool((moved < NEAR / 2).all()) and float(alike) >= 0.9):
            return "fp32"
    return "bf16"


def _answer(ensemble: Ensemble, m: int, x: Images) -> tuple[Logits, Float[Tensor, "B D"]]:
    """Logits, and the gradients of the largest of each image."""
    x = x.detach().requires_grad_()
    with frozen_weights(ensemble), torch.enable_grad():
        logits = ensemble.logits_of(m, x)
        grad = input_gradient(logits.float().amax(1), x)
    return logits.detach().float(), grad.flatten(1)


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())

"""The number of images per call of a network in an evaluation."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from redefense.ensembles import Ensemble, Independent, MemberOf
from redefense.ensembles.batches import InBatches
from redefense.evaluation.cells import Subject
from redefense.rng import CHUNK
from redefense.stochastic.ensemble import Stochastic

VALUES: Final = CHUNK * 3 * 64 * 64
"""Default largest number of values (pixels x channels, summed over images) per call."""


def default_batch_size(shape: Sequence[int]) -> int | None:
    """As many images as have `VALUES` values; None if an evaluation's chunks are no larger.

    Args:
        shape: (channels, height, width) of an image.
    """
    fits = VALUES // math.prod(shape)
    return None if fits >= CHUNK else max(1, fits)


def bounded(subject: Subject, batch_size: int | None) -> Subject:
    """The subject with networks that are called with at most `batch_size` images; None: default."""
    size = default_batch_size(subject.x.shape[1:]) if batch_size is None else batch_size
    return replace(subject, ensemble=in_batches(subject.ensemble, size), batch_size=size)


def in_batches(ensemble: Ensemble, batch_size: int | None) -> Ensemble:
    """The ensemble with networks called with at most so many images; unchanged for None."""
    if batch_size is None:
        return ensemble
    if isinstance(ensemble, Stochastic):
        return ensemble.on(InBatches(ensemble.model, batch_size))
    # members of others, as `Hyper`, are computed by the ensemble
    own = isinstance(ensemble, Independent)
    networks = [ensemble.member(m) if own else MemberOf(ensemble, m)
                for m in range(ensemble.num_members)]  # fmt: skip
    found = Independent([InBatches(it, batch_size) for it in networks], ensemble.mixture)
    found.origin = ensemble.origin
    # the modes of the networks are theirs: wrapping must not change what `training` says
    found.training = found.members.training = ensemble.training
    return found


def noise_of(subject: Subject) -> dict[str, int | None]:
    """The batch size where it determines the random numbers of a stochastic network.

    Only then saved records of another batch size must not be mixed with the new ones.
    """
    drawn = isinstance(subject.ensemble, Stochastic)
    return {"batch_size": subject.batch_size} if drawn else {}

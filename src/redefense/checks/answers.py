"""Checks before the first attack that a member's output is a function of the image alone.

A member is refused if its forward pass is random, if its output depends on the other images of the
batch, or if it differs in the mode in which the member was given. Smaller differences make S42 or
S43 fail.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from redefense.attacks.pixels import format_of
from redefense.checks.check import Check
from redefense.checks.sample import SAMPLE, evenly_spread, rounding_of
from redefense.ensembles import Ensemble, evaluating
from redefense.errors import InputError
from redefense.networks import MASKED, mode_of
from redefense.rng import CHUNK, generators_kept, stream
from redefense.threat import Threat
from redefense.types import Float, Images, Labels, Logits, check_labels

REPEATS: Final = 8
"""Repetitions of equal queries: a draw among two outcomes is missed with probability 1/256 per
image."""
ROUNDING: Final = 1e-3
"""Allowed difference between equal calls, as a share of the range of the logits."""
KERNELS: Final = 1e-2
"""The same between batches and memory layouts, which may use other kernels (TF32, int8)."""
GROSS: Final = 5e-2
"""Larger differences between batches are refused; those above `KERNELS` cause a warning."""
ULPS: Final = 8
"""Additional allowed difference, in rounding units of the logits (bfloat16, large offsets)."""
REASKED: Final = 256
"""Largest number of images queried again in other batches and after the attacks."""


def check_outputs(ensemble: Ensemble, x: Images, y: Labels, *, drawn: bool = False) -> int:
    """Query every member with a few images and validate the outputs.

    Args:
        ensemble: the ensemble to query.
        x: the images.
        y: their labels.
        drawn: the members are seeds of a stochastic network, whose outputs may differ.

    Returns:
        The number of classes.

    Raises:
        InputError: if a member fails on the images, does not return (B, C) logits of as many
            classes as the others, has a random forward pass, if its output for an image depends on
            the other images in its batch, or if a label lies outside [0, C).
    """
    counts = [classes_of(ensemble, m, x[:1]) for m in range(ensemble.num_members)]
    if len(set(counts)) > 1:
        raise InputError(f"members must have equal numbers of classes, got {counts}")
    check_labels(y, len(x), counts[0])
    points = sample_points(x)
    for m in () if drawn else range(ensemble.num_members):
        _check_function(ensemble, m, points)
    return counts[0]


def check_modes(ensemble: Ensemble, x: Images) -> None:
    """Compare outputs in the mode in which networks were given with those in evaluation mode.

    Networks, their buffers and the global generators are restored.

    Raises:
        InputError: if a member's outputs differ, as with active dropout or batch norm.
    """
    if not any(mode_of(child) for child in ensemble.modules()):
        return
    points = sample_points(x)
    for m in range(ensemble.num_members):
        # in training mode batch norm updates its statistics
        with state_restored(ensemble):
            with evaluating(ensemble):
                evaluated, *again = (query_member(ensemble, m, points) for _ in range(1 + REPEATS))
            try:
                given = query_member(ensemble, m, points)
            except InputError as error:
                raise _other_mode(ensemble, m, str(error)) from None
        if any(bool((differences(evaluated, z) > ROUNDING).any()) for z in again):
            continue  # random in evaluation mode too, which `check_outputs` refuses
        if bool((differences(evaluated, given) > ROUNDING).any()):
            raise _other_mode(ensemble, m, f"there {difference_text(evaluated, given)}")


def in_fastest_format(ensemble: Ensemble, x: Images) -> Images:
    """The images in channels-last format, which is fastest for convolutions, if outputs agree.

    Otherwise the memory format is unchanged, or contiguous if a member fails on the given one, as
    networks that call `view` on their features.
    """
    some = x[:SAMPLE]
    with_last = _answers(ensemble, some.contiguous(memory_format=torch.channels_last))
    if with_last is None:
        return _first(x)
    with_first = _answers(ensemble, _first(some))
    # images that were given in channels-last format stay in it
    if with_first is None or format_of(x) == torch.channels_last:
        return x.contiguous(memory_format=torch.channels_last)
    alike = (
        bool((differences(a, b) <= KERNELS).all())
        for a, b in zip(with_first, with_last, strict=True)
    )
    return x.contiguous(memory_format=torch.channels_last) if all(alike) else _first(x)


def _first(x: Images) -> Images:
    """A copy in channels-first format: images of one channel have both formats."""
    return x.clone(memory_format=torch.contiguous_format)


def query_member(ensemble: Ensemble, m: int, x: Images) -> Logits:
    """(B, C) logits of member m, without a graph."""
    with torch.no_grad():
        return ensemble.logits_of(m, x)


def sample_points(x: Images) -> Float[Tensor, "K ch H W"]:
    """A few images, the same images with noise of 8/255, and one image of noise."""
    images = x[evenly_spread(x)]
    uniform = torch.rand(images.shape, generator=stream(0, "points"), dtype=torch.float64).to(x)
    noisy = (images + Threat(eps=8 / 255).noise(uniform)).clamp(0, 1)
    return torch.cat([images, noisy, uniform[:1]])


def differences(first: Tensor, other: Tensor) -> Tensor:
    """(B,) largest difference of an image's logits, as a share of their range over all images.

    Rounding errors of `ULPS` units of a class's logits are subtracted. The range is the largest
    over classes, so that offsets and masked classes (large negative constants) do not count.
    """
    eps = rounding_of(first)
    a, b = first.double(), other.double()
    # classes that are masked for some images only do not show the size of the other logits
    given = a.isfinite() & (a != MASKED)
    finite = given & b.isfinite() & (b != MASKED)
    # entries that are not finite are either equal or entirely different
    gap = torch.where(
        finite, (a - b).abs(), torch.where(a.eq(b) | a.isnan() & b.isnan(), 0.0, torch.inf)
    )
    known = a.masked_fill(~given, 0.0)
    size, span = known.abs().amax(0), (known.amax(0) - known.amin(0)).amax()
    beyond = (gap - ULPS * eps * size).clamp_min(0).amax(1)
    return beyond / span.clamp_min(torch.finfo(torch.float64).tiny)


def classes_of(ensemble: Ensemble, m: int, x: Images) -> int:
    """The number of classes of member m."""
    return query_member(ensemble, m, x).shape[1]


def _check_function(ensemble: Ensemble, m: int, points: Images) -> None:
    """Refuse member m if its outputs are random or depend on the batch."""
    answers = query_member(ensemble, m, points)
    for _ in range(REPEATS):
        if bool(
            (differences(answers, again := query_member(ensemble, m, points)) > ROUNDING).any()
        ):
            raise InputError(
                f"member {m} returns different outputs for one image "
                f"({difference_text(answers, again)}): "
                "draws inside a forward pass cannot be enumerated; pass the networks it draws from "
                "as a list"
            )
    check_batches(ensemble, m, points, answers)


def check_batches(ensemble: Ensemble, m: int, points: Images, answers: Logits) -> None:
    """Refuse a member whose outputs for `points`, `answers`, differ in other batches.

    Raises:
        InputError: if the output for an image depends on the other images in its batch.
    """
    for size in (1, 3):
        # reversed, so that most images are in a batch with others than before
        other = _in_batches(ensemble, m, points.flip(0), size).flip(0)
        if bool((differences(answers, other) > GROSS).any()):
            raise InputError(
                f"the output of member {m} for an image depends on the other images in its batch "
                f"(batches of {len(points)} and of {size}: {difference_text(answers, other)}), so "
                "no figure would hold for single queries: make it depend on the image alone, as "
                "batch norm with running statistics in evaluation mode"
            )


def _in_batches(ensemble: Ensemble, m: int, x: Images, size: int) -> Logits:
    return torch.cat([query_member(ensemble, m, part) for part in x.split(size)])


def difference_text(first: Tensor, other: Tensor) -> str:
    """Describe the difference of two outputs for the same images."""
    share = float(differences(first, other).amax())
    labels = int((first.argmax(1) != other.argmax(1)).sum())
    far = f"{100 * share:.2g} % of their range" if share < 10 else "more than their range"
    return f"logits differ by {far}, {labels} of {len(first)} labels change"


def _other_mode(module: nn.Module, m: int, what: str) -> InputError:
    active = {
        type(child).__name__
        for child in module.modules()
        if mode_of(child) and isinstance(child, (_DropoutNd, _NormBase))
    }
    layers = f" (active layers: {', '.join(sorted(active))})" if active else ""
    return InputError(
        f"member {m} was given in training mode{layers} and its outputs differ in evaluation mode: "
        f"{what}; call .eval() on it if it is deployed in evaluation mode, since outputs that are "
        "random or depend on the batch cannot be measured"
    )


@contextmanager
def state_restored(module: nn.Module) -> Iterator[None]:
    """Restore buffers and the global generators on exit."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = {b.device.index for b, _ in before if b.device.type == "cuda"}
    with generators_kept(), torch.random.fork_rng(devices=sorted(devices)):
        yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def _answers(ensemble: Ensemble, x: Images) -> list[Tensor] | None:
    """Every member's logits, or None if one fails on images in this memory format."""
    try:
        answers = [query_member(ensemble, m, x) for m in range(ensemble.num_members)]
        # other kinds of output are refused by `check_outputs`
        fit = (isinstance(z, Tensor) and z.ndim == 2 and len(z) == len(x) for z in answers)
        return answers if all(fit) else None
    except (InputError, TypeError):  # `check_outputs` reports the error
        return None


@dataclass(frozen=True, slots=True)
class Answers:
    """Outputs of every member for some of the images, before the first attack."""

    ensemble: Ensemble
    x: Images
    logits: Sequence[Logits]

    @classmethod
    def to(cls, ensemble: Ensemble, x: Images) -> "Answers":
        """Query every member with at most `REASKED` images, in batches as attacks use.

        Images with noise are added: the outputs of a single image would have no range.
        """
        some = torch.cat([x[evenly_spread(x, REASKED)], sample_points(x)])
        some = some.contiguous(memory_format=format_of(x))
        members = range(ensemble.num_members)
        return cls(ensemble, some, [_in_batches(ensemble, m, some, CHUNK) for m in members])

    def elsewhere(self) -> Check:
        """S42: the same images in small, shuffled batches and in the other memory layout."""
        order = torch.randperm(len(self.x), generator=stream(0, "S42")).to(self.x.device)
        (to,) = {torch.channels_last, torch.contiguous_format} - {format_of(self.x)}
        bad, largest = [], 0.0
        for m, first in enumerate(self.logits):
            size = min(7, len(self.x) - 1)
            shuffled = _in_batches(self.ensemble, m, self.x[order], size)[order.argsort()]
            others = {"in other batches": shuffled}
            with suppress(InputError):  # attacks use only the format that it supports
                turned = self.x.clone(memory_format=to)
                others["in the other memory layout"] = _in_batches(self.ensemble, m, turned, CHUNK)
            for where, answers in others.items():
                gap = float(differences(first, answers).amax())
                largest = max(largest, gap)
                if gap > KERNELS:
                    bad.append(
                        f"{where} outputs of member {m} differ ({difference_text(first, answers)})"
                    )
        return Check("S42", not bad, "; ".join(bad) if bad else
                     "outputs depend on the image alone, not on batch or memory format "
                     f"(up to {100 * largest:.1g} % of their range)")  # fmt: skip

    def later(self) -> Check:
        """S43: equal outputs before and after the attacks."""
        bad = [
            f"member {m} ({difference_text(first, again)})"
            for m, first in enumerate(self.logits)
            for again in [_in_batches(self.ensemble, m, self.x, CHUNK)]
            if bool((differences(first, again) > ROUNDING).any())
        ]
        return Check("S43", not bad, f"changed while the attacks ran: {'; '.join(bad)}" if bad
                     else "equal outputs before and after the attacks")  # fmt: skip

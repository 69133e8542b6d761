"""The sample of images that S-checks attack, and the accuracy on it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, cast

import torch
from torch import Tensor, nn

from redefense.attacks import Attack
from redefense.ensembles import Ensemble
from redefense.networks import MASKED
from redefense.rng import stream
from redefense.threat import Threat
from redefense.types import Images, Labels, correct

SAMPLE: Final = 32
"""Images looked at."""
PIXELS: Final = 100_000
"""Checks of each member look at so many numbers at most, but at four images at least."""


def evenly_spread(x: Images, most: int = SAMPLE // 2) -> Tensor:
    """Indices of at most so many images, from the first to the last; of large images fewer."""
    count = min(len(x), most, max(4, most * PIXELS // (SAMPLE * x[0].numel())))
    return torch.linspace(0, len(x) - 1, count).round().long().to(x.device)


def rounding_of(logits: Tensor) -> float:
    """The unit of rounding of the arithmetic that logits were computed in, as far as they show it.

    Logits of half precision are handed over in single precision, whose unit says nothing of them.
    """
    known = logits[logits.isfinite() & (logits > MASKED)]
    for coarse in (torch.bfloat16, torch.float16):
        if bool((known.to(coarse).to(known.dtype) == known).all()):
            return torch.finfo(coarse).eps
    return torch.finfo(logits.dtype).eps


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The ensemble, a few of its images, the threat, and what the suite's white boxes achieved.

    Attributes:
        found: (n,) lowest expected correctness over the suite's bounded white-box cells; None
            where the suite has none.
        keep: takes all points within the headline's threat; None at other threats.
    """

    ensemble: Ensemble
    x: Images
    y: Labels
    threat: Threat
    seed: int
    found: Tensor | None = None
    keep: Callable[[Images], object] | None = None

    def run(self, attack: Attack, name: str, victim: nn.Module | None = None) -> Tensor:
        """Points that an attack finds on the ensemble, or on another victim."""
        subject = cast(nn.Module, self.ensemble) if victim is None else victim
        x_adv = attack(subject, self.x, self.y, self.threat, rng=stream(self.seed, name))
        self.count(x_adv)
        return x_adv

    def count(self, x: Tensor) -> None:
        """Let points within the threat count for the headline, as those of attacks do."""
        if self.keep is not None:
            self.keep(x)

    def q(self, x: Tensor, ensemble: Ensemble | None = None) -> Tensor:
        """(n,) expected correctness."""
        judge = self.ensemble if ensemble is None else ensemble
        with torch.no_grad():
            hits = correct(judge.member_logits(x), self.y).double()
        return judge.mixture.to(hits) @ hits

    def at(self, eps: float, norm: float | None = None) -> "Sample":
        """The same at another budget, without the suite's results."""
        threat = Threat(norm=self.threat.norm if norm is None else norm, eps=eps)
        return replace(self, threat=threat, found=None, keep=None)

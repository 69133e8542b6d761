"""The sample of images that S-checks attack, and the accuracy on it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from redefense.attacks import Attack
from redefense.ensembles import Ensemble
from redefense.networks import MASKED
from redefense.results.accuracy import Bools
from redefense.rng import stream
from redefense.threat import Threat
from redefense.types import Images, Labels, correct

SAMPLE: Final = 32
"""Number of images in the sample."""
PIXELS: Final = 100_000
"""Largest number of values that checks of each member use, but at least four images."""


def spread(x: Images, most: int = SAMPLE) -> Tensor:
    """Indices of at most `most` evenly spaced images: data may be sorted by class."""
    count = min(len(x), most)
    return torch.linspace(0, len(x) - 1, count).round().long().to(x.device)


def evenly_spread(x: Images, most: int = SAMPLE // 2) -> Tensor:
    """As `spread`; fewer for large images."""
    return spread(x, min(most, max(4, most * PIXELS // (SAMPLE * x[0].numel()))))


def rounding_of(logits: Tensor) -> float:
    """The machine epsilon of the precision in which logits were computed, inferred from values.

    Half-precision logits arrive as float32, so their dtype does not show it.
    """
    known = logits[logits.isfinite() & (logits > MASKED)]
    # the coarser one first: numbers of few digits are exact in both
    for coarse in (torch.bfloat16, torch.float16):
        if bool((known.to(coarse).to(known.dtype) == known).all()):
            return torch.finfo(coarse).eps
    return torch.finfo(logits.dtype).eps


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The ensemble, some of its images, the threat, and the results of the suite's white boxes.

    Attributes:
        found: (n,) lowest expected correctness over the suite's bounded white-box cells; None
            if the suite has none.
        keep: called with all points within the headline's threat, gives the members' (M, B)
            correctness on them; None at other threats.
    """

    ensemble: Ensemble
    x: Images
    y: Labels
    threat: Threat
    seed: int
    found: Tensor | None = None
    keep: Callable[[Images], Bools] | None = None

    def run(self, attack: Attack, name: str, victim: nn.Module | None = None) -> Tensor:
        """Points (n, C, H, W) of an attack on the ensemble, or on another victim."""
        subject = self.ensemble if victim is None else victim
        x_adv = attack(subject, self.x, self.y, self.threat, rng=stream(self.seed, name))
        self.count(x_adv)
        return x_adv

    def count(self, x: Tensor) -> None:
        """Count points within the threat for the headline, as those of attacks."""
        if self.keep is not None:
            self.keep(x)

    def counted(self, x: Images) -> Tensor:
        """(R n,) expected correctness on R rounds of points, which are counted in the same pass."""
        if self.keep is not None:
            hits = torch.from_numpy(self.keep(x)).to(x.device).double()
            return self.ensemble.mixture.to(hits) @ hits
        return self.q(x)

    def q(self, x: Tensor, ensemble: Ensemble | None = None) -> Tensor:
        """(R n,) expected correctness on R rounds of points, one for each image in each."""
        judge = self.ensemble if ensemble is None else ensemble
        with torch.no_grad():
            logits = judge.member_logits(x)
        hits = correct(logits, self.y.repeat(len(x) // len(self.y))).double()
        return judge.mixture.to(hits) @ hits

    def at(self, eps: float, norm: float | None = None) -> "Sample":
        """The same sample at another budget, without the suite's results."""
        threat = Threat(norm=self.threat.norm if norm is None else norm, eps=eps)
        return replace(self, threat=threat, found=None, keep=None)

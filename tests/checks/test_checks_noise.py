"""S19: random corners of the ball are compared with the attacks, and count for the headline."""

import pytest
import torch
from torch import Tensor, nn

from redefense.checks import attacks
from redefense.checks.sample import Sample
from redefense.ensembles import Independent
from redefense.evaluation.cascade.tried import Tried
from redefense.rng import stream
from redefense.threat import Threat

X, Y, THREAT = torch.full((5, 1, 2, 2), 0.5), torch.zeros(5, dtype=torch.long), Threat(eps=0.125)


class Corner(nn.Module):
    """Class 1 where all pixels have moved up; no gradient leads there."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        moved = (x.flatten(1)[:, : self.pixels] > 0.6).all(1).to(x)
        return torch.stack([0.5 - moved, moved - 0.5], 1)


def corners(count: int) -> list[Tensor]:
    """The same corners, drawn one at a time."""
    rng = stream(0, "S19")
    signs = [torch.randint(0, 2, X.shape, generator=rng) * 2.0 - 1 for _ in range(count)]
    return [THREAT.project(X + THREAT.eps * sign, X) for sign in signs]


@pytest.mark.parametrize("count", [1, 3, 47])
def test_corners_judged_in_batches_count_as_those_judged_alone(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = Independent([Corner(1), Corner(4)]).eval()
    together, alone = (Tried(ensemble, X, Y, THREAT) for _ in range(2))
    monkeypatch.setattr(attacks, "CORNERS", count)
    sample = Sample(
        ensemble=ensemble, x=X, y=Y, threat=THREAT, seed=0, keep=together.offer_rounds,
        found=torch.ones(5, dtype=torch.float64),
    )  # fmt: skip
    check = attacks.noise(sample)
    lowest = torch.ones(5, dtype=torch.float64)
    for point in corners(count):
        alone.offer(point)
        lowest = torch.minimum(lowest, sample.q(point))
    for name in ("correct", "alone", "averaged"):
        assert (getattr(together.cell, name) == getattr(alone.cell, name)).all()
    fooled = int((lowest < 1).sum())
    assert fooled > 0
    assert (check.passed, check.detail.split()[0]) == (False, str(fooled))


def test_corners_that_fool_no_more_than_the_attacks_pass() -> None:
    sample = Sample(
        ensemble=Independent([Corner(1), Corner(4)]).eval(), x=X, y=Y, threat=THREAT, seed=0,
        found=torch.zeros(5, dtype=torch.float64),
    )  # fmt: skip
    assert attacks.noise(sample).passed

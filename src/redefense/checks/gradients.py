"""S-checks of the gradients that attacks depend on (after Pintor et al., 2022)."""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.attacks.adaptive import Support, mean_oracle
from redefense.attacks.base import Best, OracleResult
from redefense.attacks.gradient import climb, random_starts
from redefense.checks.check import Check
from redefense.checks.sample import Sample
from redefense.ensembles import Ensemble
from redefense.rng import stream
from redefense.threat import Threat

TRACKED_STEPS: Final = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """Trace of an attack: the objective and expected correctness per query and image."""

    value: Tensor
    correct: Tensor
    returned: Tensor


def track(sample: Sample) -> Track:
    """Trace PGD on the mean probability for 50 steps."""
    support = Support(sample.ensemble)
    oracle, seen = mean_oracle(support, sample.y), list[OracleResult]()

    def watched(x: Tensor, with_grad: bool) -> OracleResult:
        seen.append(oracle(x, with_grad))
        return seen[-1]

    start = random_starts(sample.x, sample.y, sample.threat, stream(sample.seed, "track"))()
    best = Best.start(sample.x)
    with torch.no_grad():
        climb(
            watched, start, sample.x, sample.threat, steps=TRACKED_STEPS,
            step_size=0.25 * sample.threat.eps, best=best,
        )  # fmt: skip
    value, correct = (torch.stack([getattr(s, key) for s in seen]) for key in ("value", "correct"))
    sample.count(best.x)
    return Track(value=value, correct=correct, returned=sample.q(best.x))


def incomplete(tracked: Track) -> Check:
    """S23: share of the objective's total gain in the last 10 steps."""
    best = tracked.value.cummax(0).values
    span = (best[-1] - best[0]).clamp_min(1e-12)
    # ten steps before the last point, which follows the last step
    late = float(((best[-1] - best[-11]) / span).median())
    return Check("S23", late <= 0.05, f"the last 10 of {TRACKED_STEPS} steps have {late:.3f} "
                 "of the gain (flag above 0.05)")  # fmt: skip


def silent(tracked: Track) -> Check:
    # 1e-6: the trace is in single precision
    lost = int((tracked.correct.amin(0) < tracked.returned - 1e-6).sum())
    return Check("S24", lost == 0, f"{lost} images had a better point than the one returned")


def ascent(tracked: Track) -> Check:
    share = float((tracked.value[-1] >= tracked.value[0] - 1e-6).double().mean())
    return Check("S26", share >= 0.99, f"the objective rose on {100 * share:.0f} % of the images")


def stability(sample: Sample) -> Check:
    """S25: mean relative change of the loss over 100 random points within 8/255."""
    rng, threat = stream(sample.seed, "S25"), Threat(eps=8 / 255)

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(sample.ensemble.averaged()(x), sample.y, reduction="none")

    base, changes = loss(sample.x), []
    for _ in range(100):
        uniform = torch.rand(sample.x.shape, generator=rng).to(sample.x)
        point = threat.project(sample.x + threat.noise(uniform), sample.x)
        # a loss near 0 has no meaningful relative change
        changes.append((loss(point) - base).abs() / base.clamp_min(1e-3))
    change = float(torch.stack(changes).mean())
    return Check("S25", change <= 0.1, f"mean relative loss change {change:.2f} (flag above 0.1)")


class Planted(nn.Module):
    """A two-class head per image with a known adversarial point inside the ball.

    The head separates the members' mean logits at the image from those at the planted point.
    """

    def __init__(self, ensemble: Ensemble, x: Tensor, planted: Tensor) -> None:
        super().__init__()
        self.members = ensemble.member_logits
        with torch.no_grad():
            here, there = self.members(x).mean(0), self.members(planted).mean(0)
        self.normal, self.middle = there - here, (here + there) / 2

    def forward(self, x: Tensor) -> Tensor:
        z = ((self.members(x).mean(0) - self.middle) * self.normal).sum(1)
        return torch.stack([-z, z], 1)


def active(sample: Sample) -> Check:
    """S27: the attack finds planted adversarial points (after Zimmermann et al., 2022)."""
    rng = stream(sample.seed, "S27")
    sign = torch.randint(0, 2, sample.x.shape, generator=rng).to(sample.x) * 2 - 1
    # at half the radius, so that the attack need not reach the surface exactly
    planted = sample.threat.project(sample.x + 0.5 * sample.threat.eps * sign, sample.x)
    head = Planted(sample.ensemble, sample.x, planted)
    y = torch.zeros_like(sample.y)
    x_adv = ATTACKS["pgd"]()(head, sample.x, y, sample.threat, rng=stream(sample.seed, "S27 pgd"))
    sample.count(x_adv)
    with torch.no_grad():
        # no point is planted where the outputs at both points are equal
        there, hit = (head(at).argmax(1) == 1 for at in (planted, x_adv))
    if not bool(there.any()):
        return Check("S27", False, "the members' outputs are constant within the ball")
    found = float(hit[there].double().mean())
    return Check("S27", found >= 0.95, f"{100 * found:.0f} % of planted adversarial points found")


def climbed(sample: Sample) -> list[Check]:
    """S23, S24 and S26 from one trace."""
    tracked = track(sample)
    return [incomplete(tracked), silent(tracked), ascent(tracked)]

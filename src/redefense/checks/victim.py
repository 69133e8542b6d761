"""S-checks of the victim model, run before every evaluation."""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.attacks.gradient import PGD
from redefense.attacks.objectives import margin
from redefense.checks.check import Check
from redefense.checks.derivative import derivatives_agree, log_odds
from redefense.checks.sample import rounding_of, spread
from redefense.ensembles import Ensemble, frozen_weights
from redefense.networks import differentiating, mode_of
from redefense.rng import seeded, stream
from redefense.threat import Threat


def before_run(ensemble: Ensemble, x: Tensor, y: Tensor, *, repeats: bool = True) -> list[Check]:
    """Checks of the victim model and of the scale of its images.

    Args:
        ensemble: the members.
        x: the images.
        y: their labels.
        repeats: whether a member gives equal outputs in equal calls, which differences need.
    """
    agree = (
        derivatives_agree(ensemble, x, y)
        if repeats
        else Check("S41", None, "needs outputs that repeat")
    )
    rows = spread(x)
    x, y = x[rows], y[rows]
    return [
        agree,
        _units(x),
        _side_effects(ensemble, x, y),
        _isolation(ensemble, x[:4], y[:4]),
        _output_kind(ensemble, x, y),
        _zero_gradients(ensemble, x, y),
    ]


def _units(x: Tensor) -> Check:
    """S04: images use the range [0, 1]; if they were scaled twice, every eps would be huge."""
    # images divided by 255 twice span one level
    span = 255 * float(x.max() - x.min())
    return Check("S04", span > 8, f"the images span {span:.0f} of 255 levels")


def _isolation(ensemble: Ensemble, x: Tensor, y: Tensor) -> Check:
    """S06: the drawn members do not depend on the attack's seed or the global generator."""
    logs = []
    for seed in (0, 1):
        # the draws have a fixed seed: only the attack's and the global ones differ
        meter = QueryLog(ensemble)
        with seeded(seed, x.device):
            victim = meter.sampled(rng=stream(0, "S06 draws"))
            # so many draws are not equal by chance
            PGD(steps=6)(victim, x, y, Threat(eps=0.1), rng=stream(seed, "S06"))
        logs.append(meter.queried)
    same = logs[0] == logs[1]
    return Check("S06", same, f"{len(logs[0])} draws, " + ("equal" if same else "different") +
                 " for two seeds of the attack")  # fmt: skip


class QueryLog(Ensemble):
    """An ensemble that records which member was queried."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__(ensemble.num_members, ensemble.mixture)
        self.ensemble = ensemble
        self.queried: list[int] = []

    def logits_of(self, m: int, x: Tensor) -> Tensor:
        self.queried.append(m)
        return self.ensemble.logits_of(m, x)

    def member(self, m: int) -> nn.Module:
        return self.ensemble.member(m)


def _side_effects(ensemble: Ensemble, x: Tensor, y: Tensor) -> Check:
    with unchanged_state(ensemble) as changes:
        ATTACKS["pgd"]()(ensemble, x, y, Threat(eps=0.1), rng=stream(0, "S05"))
    return Check("S05", not changes(), ", ".join(changes()) or "an attack changed no state")


@contextmanager
def unchanged_state(module: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Yield a function that returns the names of all state changed since the block began."""

    def snapshot() -> dict[str, Any]:
        return {
            "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
            "requires_grad": [p.requires_grad for p in module.parameters()],
            "modes": [mode_of(child) for child in module.modules()],
            "buffers": [b.clone() for b in module.buffers()],
            "torch's generator": torch.get_rng_state(),
            # the state has an array, whose comparison with == is no single truth value
            "numpy's generator": str(np.random.get_state()),
            "Python's generator": random.getstate(),
        }

    before = snapshot()

    def changes() -> list[str]:
        after = snapshot()
        return [name for name in before if not _equal(before[name], after[name])]

    yield changes


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(_equal(u, v) for u, v in zip(a, b, strict=True))
    return bool(a == b)


def _output_kind(ensemble: Ensemble, x: Tensor, y: Tensor) -> Check:
    with torch.no_grad():
        logits = ensemble.member_logits(x)
    sums = logits.sum(-1)
    if not bool(logits.isfinite().all()):
        return Check("S07", False, "non-finite outputs")
    # probabilities of half precision add up to 1 only up to their rounding
    allowed = torch.tensor([max(1e-4, rounding_of(z)) for z in logits]).to(sums)
    kinds = (logits >= 0).flatten(1).all(1) & ((sums - 1).abs().amax(1) < allowed)
    if bool(kinds.any()):
        which = ", ".join(str(m) for m in kinds.nonzero().flatten().tolist())
        return Check("S07", False, f"members {which} return probabilities; attacks need logits")
    # computed in another way than by `margin`, which is checked
    top = logits.topk(2, dim=-1)
    right = top.indices[..., 0] == y
    runner_up = torch.where(right, top.values[..., 1], top.values[..., 0])
    own = logits.gather(-1, y.expand(len(logits), -1)[..., None])[..., 0] - runner_up
    gap = float((own + torch.stack([margin(z, y) for z in logits])).abs().max())
    return Check("S07", gap < 1e-5, f"members return logits; margins agree to {gap:.1g}")


def _zero_gradients(ensemble: Ensemble, x: Tensor, y: Tensor) -> Check:
    """S22: gradients at the images and at a random start, per member, in the attacks' precision."""
    uniform = torch.rand(x.shape, generator=stream(0, "S22"), dtype=torch.float64).to(x)
    lost, starts = 0, (x + Threat(eps=8 / 255).noise(uniform)).clamp(0, 1)
    with frozen_weights(ensemble), torch.enable_grad():
        for m, at in itertools.product(range(ensemble.num_members), (x, starts)):
            point = at.detach().clone().requires_grad_()
            # of the log odds: the gradient of cross-entropy vanishes for large logits
            loss = log_odds(ensemble.logits_of(m, point.clone()), y).sum()
            grad = None
            if loss.requires_grad:
                with differentiating():
                    (grad,) = torch.autograd.grad(loss, point, allow_unused=True)
            if grad is None:
                lost += len(x)
                continue
            size = grad.flatten(1).abs().amax(1)
            lost += int((~(size > 0) | ~size.isfinite()).sum())
    total = 2 * ensemble.num_members * len(x)
    return Check("S22", lost == 0, f"{lost} of {total} input gradients are zero or not finite")

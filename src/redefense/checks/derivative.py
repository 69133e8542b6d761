"""S41: gradients of the networks compared with finite differences of their logits."""

from typing import Final, cast

import torch
from torch import Tensor, nn

from redefense.attacks.base import input_gradient
from redefense.checks.results import Check
from redefense.checks.sample import evenly_spread, rounding_of
from redefense.ensembles import Ensemble, frozen_weights
from redefense.networks import MASKED
from redefense.types import Float, Images, Labels

STEPS: Final = (0.0005, 0.002, 0.01, 0.05)
"""Root mean square changes of a pixel: small ones for kinks, large ones for coarse arithmetic."""
FACTOR: Final = 2.0
"""By how much the measured slope may differ from the gradient's length."""
ROUNDING: Final = 256
"""Differences below so many units of rounding of the logits say nothing."""
ENOUGH: Final = 0.75
"""Share of the images, of those that can be measured, on which the two must agree."""


def derivatives_agree(ensemble: Ensemble, x: Images, y: Labels) -> Check:
    """S41: along its gradient each member's loss rises as fast as the gradient says.

    The loss is the log odds of the true class, computed from the logits in double precision, so
    that large logits do not saturate it. Its central difference along the gradient is compared with
    the gradient's length, at several step sizes, of which one must agree. A gradient that is
    reversed, random or constant agrees on few images. Images whose gradient is zero are S22's.
    """
    rows = evenly_spread(x)
    # away from the ends of the box, where networks that clip their input have a kink
    x, y = 0.9 * x[rows] + 0.05, y[rows]
    shares = [_share(ensemble, m, x, y) for m in range(ensemble.num_members)]
    known = [share for share in shares if share is not None]
    if not known:
        return Check("S41", None, "no gradient is large enough to be compared with differences")
    bad = [m for m, share in enumerate(shares) if share is not None and share < ENOUGH]
    if not bad:
        least = f"{100 * min(known):.0f} %"
        return Check("S41", True, f"gradients agree with differences on {least} of the images")
    each = ", ".join(f"member {m} on {100 * (shares[m] or 0.0):.0f} %" for m in bad)
    return Check(
        "S41",
        False,
        f"gradients agree with differences of the logits only for {each} of the images, so attacks "
        "that follow them are misled and the accuracy is too high: look for operations with a "
        "backward pass of their own, or attack without gradients (square)",
    )


def _share(ensemble: Ensemble, m: int, x: Images, y: Labels) -> float | None:
    """Share of the images on which one step size agrees; None if none can be measured."""
    with frozen_weights(cast(nn.Module, ensemble)), torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        logits = ensemble.logits_of(m, point.clone())
        grad = input_gradient(log_odds(logits, y), point)
    length = grad.double().flatten(1).norm(dim=1)
    unit = grad.double() / length.clamp_min(1e-300).view(-1, 1, 1, 1)
    finite = logits.detach().double().nan_to_num(0.0, 0.0, 0.0)
    finite = finite.masked_fill(finite <= MASKED, 0.0)  # masked classes are large and say nothing
    rounding = ROUNDING * rounding_of(logits.detach()) * finite.abs().amax(1)
    measured = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    agrees = measured.clone()
    for step in STEPS:
        moved = step * x[0].numel() ** 0.5 * unit
        with torch.no_grad():
            ahead = log_odds(ensemble.logits_of(m, (x + moved).to(x.dtype)), y)
            behind = log_odds(ensemble.logits_of(m, (x - moved).to(x.dtype)), y)
        expected = 2 * step * x[0].numel() ** 0.5 * length
        ratio = (ahead - behind) / expected.clamp_min(1e-300)
        usable = (expected > rounding) & ratio.isfinite()
        measured |= usable
        agrees |= usable & (ratio >= 1 / FACTOR) & (ratio <= FACTOR)
    return float(agrees[measured].double().mean()) if bool(measured.any()) else None


def log_odds(logits: Tensor, y: Labels) -> Float[Tensor, " B"]:
    """(B,) log of the odds against the true class, in double precision."""
    logits = logits.double()
    others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)

"""S41: gradients of the networks compared with finite differences of their logits."""

from typing import Final

import torch
from torch import Tensor

from redefense.attacks import objectives
from redefense.attacks.base import input_gradient
from redefense.checks.check import Check
from redefense.checks.sample import evenly_spread, rounding_of
from redefense.ensembles import Ensemble, frozen_weights
from redefense.networks import MASKED
from redefense.rng import stream
from redefense.types import Float, Images, Labels

STEPS: Final = (0.0005, 0.002, 0.01, 0.05)
"""Step sizes (root mean square per pixel): small ones for kinks, large ones for low precision."""
FACTOR: Final = 2.0
"""Allowed difference between the measured slope and the gradient's norm."""
ROUNDING: Final = 256
"""Differences below this multiple of the logits' rounding error do not contradict a gradient."""
NOISE: Final = 4
"""Differences below this multiple of the rounding error do not confirm a gradient."""
ENOUGH: Final = 0.75
"""Share of the measurable images on which difference and gradient must agree."""
COMPARED: Final = 64
"""Number of images on which they are compared, enough to meet each of ten classes."""
OPPOSED: Final = 0.03
"""Share of the measurable images, at least two, above which gradients that the logits contradict at
every step size are no accident. Networks with the true gradient have none."""

SIZES: Final = (0.001, 0.005, 0.05)
"""Change of each pixel along a random direction."""
DIRECTIONS: Final = 4
"""Random directions per image."""
MISSING: Final = 0.3
"""Allowed squared norm of the missing part of a gradient, relative to that of the gradient; it must
exceed 0 by `CERTAIN` standard errors."""
CERTAIN: Final = 4.0
ALIKE: Final = 0.5
"""Correlation of the errors at two nearby points above which they are not due to rounding."""


def derivatives_agree(ensemble: Ensemble, x: Images, y: Labels) -> Check:
    """S41: the gradient of each member's loss agrees with finite differences of the loss.

    The loss is the log odds of the true class, computed from the logits in double precision, so
    that large logits do not saturate it. Its central difference along the gradient is compared with
    the gradient's norm at several step sizes, one of which must agree. A reversed, random or
    constant gradient agrees on few images; if it is wrong for some classes only, the loss falls
    along it, or hardly rises, at every step size on a few. Images with a zero gradient are left to
    S22.

    Differences along random directions then reveal missing parts of the gradient, such as pixels on
    which it is zero. Kinks, steps and rounding cause errors, too, but these are uncorrelated
    between two nearby points.
    """
    rows, few = evenly_spread(x, COMPARED), evenly_spread(x)
    # away from the box's boundary, where networks that clip their input have a kink
    x = 0.9 * x + 0.05
    compared = [_compared(ensemble, m, x[rows], y[rows]) for m in range(ensemble.num_members)]
    known = {m: float(agree.double().mean()) for m, (agree, _) in enumerate(compared) if len(agree)}
    bad = [m for m, share in known.items() if share < ENOUGH]
    opposed = {m: int(oppose.sum()) for m, (_, oppose) in enumerate(compared)}
    wrong = [m for m, n in opposed.items() if n > max(1.0, OPPOSED * len(compared[m][1]))]
    incomplete = [
        (m, lacks)
        for m in range(ensemble.num_members)
        if m not in bad and (lacks := _lacks(ensemble, m, x[few], y[few])) > MISSING
    ]
    if wrong and not bad:
        each = ", ".join(f"member {m} on {opposed[m]} of {len(compared[m][1])}" for m in wrong)
        return Check(
            "S41", False, f"differences of the logits contradict gradients of {each} images"
        )
    if incomplete and not bad:
        each = ", ".join(f"member {m} {lacks:.1f} times" for m, lacks in incomplete)
        return Check(
            "S41",
            False,
            "along random directions the logits change more than the gradients predict (squared "
            f"length of the missing part, relative to the gradient: {each})",
        )
    if not known:
        return Check("S41", None, "no gradient is large enough to be compared with differences")
    if not bad:
        least = f"{100 * min(known.values()):.0f} %"
        return Check("S41", True, f"gradients agree with differences on {least} of the images")
    each = ", ".join(f"member {m} on {100 * known[m]:.0f} %" for m in bad)
    return Check(
        "S41",
        False,
        f"gradients agree with differences of the logits only for {each} of the images",
    )


def _compared(ensemble: Ensemble, m: int, x: Images, y: Labels) -> tuple[Tensor, Tensor]:
    """Which of the measurable images have a step size that agrees, and which have none that nears.

    Returns:
        (K,) and (K,) booleans, of the K images whose slopes are larger than their rounding error.
    """
    with frozen_weights(ensemble), torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        # a clone, since a network that changes its input in place would fail on a leaf
        logits = ensemble.logits_of(m, point.clone())
        grad = input_gradient(log_odds(logits, y), point)
    length = grad.double().flatten(1).norm(dim=1)
    # 1e-300: below any nonzero gradient of single precision
    unit = grad.double() / length.clamp_min(1e-300).view(-1, 1, 1, 1)
    finite = logits.detach().double().nan_to_num(0.0, 0.0, 0.0)
    finite = finite.masked_fill(finite <= MASKED, 0.0)  # masked classes have large constants
    rounding = rounding_of(logits.detach()) * finite.abs().amax(1)
    measured = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    agrees, nears = measured.clone(), measured.clone()
    for step in STEPS:
        # per pixel, so that the step sizes suit images of any resolution
        moved = step * x[0].numel() ** 0.5 * unit
        with torch.no_grad():
            ahead = log_odds(ensemble.logits_of(m, (x + moved).to(x.dtype)), y)
            behind = log_odds(ensemble.logits_of(m, (x - moved).to(x.dtype)), y)
        expected = 2 * step * x[0].numel() ** 0.5 * length
        ratio = (ahead - behind) / expected.clamp_min(1e-300)
        large = (expected > ROUNDING * rounding) & ratio.isfinite()
        measured |= large
        agrees |= (expected > NOISE * rounding) & (ratio >= 1 / FACTOR) & (ratio <= FACTOR)
        nears |= large & (ratio > 0.5 / FACTOR)
    return agrees[measured], ~(agrees | nears)[measured]


def _lacks(ensemble: Ensemble, m: int, x: Images, y: Labels) -> float:
    """Squared norm of the gradients' missing part, relative to theirs; 0 if not significant.

    The errors of the directional derivative along a random direction are computed at two nearby
    points. The product of both errors, averaged over directions of independent signs, is the scalar
    product of the missing parts; errors that are independent between the points average out. Images
    with a zero gradient are skipped.
    """
    rng, found = stream(0, "S41", m), []
    for size in SIZES:
        # of independent signs: products of the errors then average to the scalar product
        directions = [_noise(x, rng).sign() for _ in range(DIRECTIONS)]
        errors, lengths = [], []
        for _ in range(2):
            # further apart than the step, so that the points do not share kinks
            point = (x + 4 * size * _noise(x, rng)).clamp(size, 1 - size).requires_grad_()
            with frozen_weights(ensemble), torch.enable_grad():
                grad = input_gradient(log_odds(ensemble.logits_of(m, point.clone()), y), point)
            lengths.append(grad.double().flatten(1).norm(dim=1))
            predicted = torch.stack([(grad * d).double().flatten(1).sum(1) for d in directions])
            with torch.no_grad():
                ahead, behind = (
                    torch.stack(
                        [log_odds(ensemble.logits_of(m, point + s * d), y) for d in directions]
                    )
                    for s in (size, -size)
                )
            errors.append((ahead - behind) / (2 * size) - predicted)
        # in units of the gradient's norm, so that images have equal weight
        first, second = (
            # bounded, so that a single kink does not decide the mean
            (error / length).nan_to_num(0.0, 0.0, 0.0).clamp(-4, 4).flatten()
            for error, length in zip(errors, lengths, strict=True)
        )
        both = first * second
        mean, deviation = float(both.mean()), float(both.std()) / len(both) ** 0.5
        alike = mean > ALIKE * float((first.square() + second.square()).mean()) / 2
        found.append(mean if alike and mean > CERTAIN * deviation else 0.0)
    # a missing part may be significant at one size only
    return max(found)


def _noise(x: Images, rng: torch.Generator) -> Tensor:
    """Uniform noise in [-1, 1], of the shape of the images."""
    drawn = torch.rand(x.shape, generator=rng, dtype=torch.float32) * 2 - 1
    return drawn.to(x)


def log_odds(logits: Tensor, y: Labels) -> Float[Tensor, " B"]:
    """(B,) log of the odds against the true class, in double precision."""
    return objectives.log_odds(logits.double(), y)

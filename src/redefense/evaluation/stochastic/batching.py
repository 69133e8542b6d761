"""Decides whether several draws of a stochastic network can be computed in one call.

Copies of an image within a call are several draws only if each copy has random numbers of its own.
Weights or sizes that are drawn once per call would make one draw count many times. Copies are
therefore compared with each other and with separate calls, by tests that also reject in doubt: then
each draw has a call of its own, which is slower but always valid.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2, kruskal, ks_2samp

from redefense.checks.answers import KERNELS
from redefense.checks.sample import SAMPLE, evenly_spread
from redefense.ensembles.batches import InBatches
from redefense.errors import InputError
from redefense.rng import draw_seed, stream
from redefense.stochastic.ensemble import Stochastic
from redefense.types import Float, Images, Logits

CALL_VALUES: Final = 64 * 3 * 32 * 32
"""Values of the images of one call: 64 images of 32 x 32, or one block of large ones."""
IMAGES: Final = 8
CALLS: Final = 8
COPIES: Final = 16
SEPARATE: Final = 64
LEVEL: Final = 0.05
"""Probability with which a network whose copies are independent is still given separate calls."""

CERTAIN: Final = 5.0
"""Standard errors by which the draws of an image alone and in a batch must differ to be refused."""

Values = NDArray[np.float64]


def rows_per_call(network: Stochastic, x: Images) -> int:
    """Rows of a call that computes several draws; 0 where each draw needs a call of its own.

    For `IMAGES` images, `CALLS` calls with `COPIES` copies of one image each are compared with
    `SEPARATE` calls that have one copy. Compared are two differences of logits. Copies must differ
    within every call. No test may reject, at `LEVEL` divided by the number of tests, that copies
    of one call are as far apart as those of different calls (Kruskal-Wallis, summed over images;
    two-sided, since copies that are too evenly spread are wrong, too), nor that copies and separate
    calls have one distribution (Kolmogorov-Smirnov, each image).

    What a call shares is recognised if it is a tenth of the variance, but not if it is much less or
    changes the logits only rarely.
    """
    if isinstance(network.model, InBatches) and network.model.batch_size < COPIES:
        return 0  # these calls are divided: parts would hide what each shares, and gain nothing
    images = x[evenly_spread(x, IMAGES)]
    with torch.no_grad():
        apart = torch.stack([_ask(network, images, "apart", call) for call in range(SEPARATE)])
        # two fixed classes per image: with sorted logits of each draw, noise alone would look like
        # a gap
        order = apart.mean(0).argsort(1, descending=True)
        copies = torch.stack(
            [
                torch.stack(
                    [
                        _ask(network, image.expand(COPIES, -1, -1, -1), "copies", row, call)
                        for call in range(CALLS)
                    ]
                )
                for row, image in enumerate(images.split(1))
            ]
        )
    chances, spreads = [], []
    for row in range(len(images)):
        pairs = zip(_gaps(copies[row], order[row]), _gaps(apart[:, row], order[row]), strict=True)
        for within, separate in pairs:
            span = np.ptp(separate)
            # rounding is no difference
            within, separate = (np.round(v / max(span, 1e-12), 4) for v in (within, separate))
            if any(len(np.unique(call)) == 1 for call in within):
                return 0
            spreads.append(float(kruskal(*within).statistic))
            chances.append(float(ks_2samp(within.ravel(), separate).pvalue))
    for scalar in range(2):
        total, freedom = sum(spreads[scalar::2]), (CALLS - 1) * len(images)
        # the sum of independent Kruskal-Wallis statistics is chi-square; both tails reject
        chances.append(2 * min(chi2.cdf(total, freedom), chi2.sf(total, freedom)))
    if min(chances) < LEVEL / len(chances):
        return 0
    return max(COPIES, CALL_VALUES // x[0].numel())


def check_alone(network: Stochastic, x: Images) -> None:
    """Refuse networks whose draws for an image are distributed differently alone and in a batch.

    `SEPARATE` calls with a batch are compared with as many with its first and with its last image
    alone, in their mean and in their mean distance from the median. These tests are not affected by
    rounding, which differs between the two. Differences up to `KERNELS` of the range are allowed.

    Raises:
        InputError: if the noise depends on the place in the batch or on its size.
    """
    images = x[evenly_spread(x, SAMPLE)]
    if len(images) == 1:
        return
    with torch.no_grad():
        batches = torch.stack([_ask(network, images, "batch", call) for call in range(SEPARATE)])
        # one scale for all images, in which rounding of kernels is negligible
        span = float((batches.amax((0, 1)) - batches.amin((0, 1))).amax())
        for row in (0, len(images) - 1):
            image = images[row : row + 1]
            calls = [_ask(network, image, "alone", row, call) for call in range(SEPARATE)]
            order = batches[:, row].mean(0).argsort(descending=True)
            single = _gaps(torch.cat(calls), order)
            for alone, among in zip(single, _gaps(batches[:, row], order), strict=True):
                far, near = (abs(values - np.median(values)) for values in (alone, among))
                if _differ(alone, among, KERNELS * span) or _differ(far, near, KERNELS * span):
                    raise InputError(
                        "the network's random outputs for an image are distributed differently "
                        f"alone and in a batch of {len(images)} (standard deviations "
                        f"{alone.std():.3g} and {among.std():.3g}), so no figure would hold for "
                        "single queries: draw noise of one distribution for each image, whatever "
                        "its place in the batch"
                    )


def _differ(first: Values, other: Values, allowed: float) -> bool:
    """Whether the means of two samples differ by more than is allowed, and significantly."""
    error = float(np.sqrt(first.var() / len(first) + other.var() / len(other)))
    return bool(abs(first.mean() - other.mean()) > max(allowed, CERTAIN * error))


def _ask(network: Stochastic, x: Images, *name: str | int) -> Float[torch.Tensor, "B C"]:
    seed = draw_seed(stream(network.seed, "batching", *name))
    answer: Logits = network.draw(seed, x).double()
    return answer


def _gaps(logits: torch.Tensor, order: torch.Tensor) -> tuple[Values, Values]:
    """The likeliest class's logit minus the next one's, and that one's minus the mean logit."""
    first, second = logits[..., order[0]], logits[..., order[1]]
    return (first - second).cpu().numpy(), (second - logits.mean(-1)).cpu().numpy()

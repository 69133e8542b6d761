"""Statistics of the members: transfer, fooled members, retries, diversity, accuracy over eps.

The JSON states the number of images and the settings of each measurement.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.attacks import ATTACKS
from redefense.attacks.gradient import PGD
from redefense.ensembles import Ensemble, frozen_weights
from redefense.evaluation.cascade.tried import Tried
from redefense.evaluation.cascade.worst_case import EQUAL
from redefense.evaluation.cells import Cell, Subject
from redefense.evaluation.pass_counter import Meter
from redefense.evaluation.progress import SILENT, Progress
from redefense.evaluation.store import chunk_size
from redefense.networks import differentiating
from redefense.penalties import gradient_similarity, lipschitz, pairwise_cosines
from redefense.radius import eps_text
from redefense.results.accuracy import Bools, Floats, pair_statistics
from redefense.results.headline import TRIES
from redefense.results.intervals import (
    accuracy_interval,
    exact_expectation,
    fooled_histogram,
    success_within,
)
from redefense.rng import CHUNK, stream
from redefense.threat import Threat
from redefense.types import Bool, Float, Images, Labels

MEASURED: Final = 200
"""Images on which members are measured; the attacks of the suite run on all images."""

MEASURES: Final = "measures"
ROUGH_PASSES: Final = 600
"""Approximate number of passes per image and member in `member_measures`."""

CAVEAT: Final = (
    "chosen on perturbations that were found against the present probabilities; attacks adapt to "
    "other probabilities, so evaluate again with them before reporting this figure"
)


def joint_measures(worst: Bools, mixture: Floats, corrects: Bools) -> dict[str, Any]:
    """Members fooled, the attacker's success within K tries, and the best sampling probabilities.

    Args:
        worst: (M, n) the members on each image's worst attack.
        mixture: (M,) sampling probabilities.
        corrects: (A, M, n) the members under every attack considered.
    """
    q = exact_expectation(worst, mixture)
    best, accuracy = best_mixture(corrects, mixture)
    return {
        "members_fooled": fooled_histogram(worst).tolist(),
        "success_within_tries": success_within(q, TRIES).tolist(),
        "best_mixture": {
            "mixture": best.tolist(),
            "accuracy": accuracy,
            "present": float(worst_over(corrects, mixture).mean()),
            "caveat": CAVEAT,
        },
    }


def worst_over(corrects: Bools, mixture: Floats) -> Floats:
    """(n,) lowest expected correctness over attacks, from (A, M, n)."""
    q: Floats = np.einsum("m,amn->an", mixture, corrects.astype(np.float64)).min(0)
    return q


def best_mixture(corrects: Bools, present: Floats, steps: int = 300) -> tuple[Floats, float]:
    """Sampling probabilities with the highest worst-case accuracy over recorded attacks.

    Args:
        corrects: (A, M, n) correctness of every member under every attack.
        present: (M,) the probabilities in use; the result is at least as good as these, as uniform
            ones, and as any single member.
        steps: number of ascent steps.

    Returns:
        (M,) probabilities and their accuracy. The objective is concave and piecewise linear;
        it is maximised by exponentiated supergradients (Kivinen & Warmuth, 1997).
    """
    wins = corrects.astype(np.float64)
    num_members, images = wins.shape[1], np.arange(wins.shape[2])
    weights = np.full(num_members, 1 / num_members)
    candidates = [present, weights, *np.eye(num_members)]
    for step in range(steps):
        q = np.einsum("m,amn->an", weights, wins)
        # a supergradient of a minimum is that of the smallest term, here of each image's worst
        # attack
        slope = wins[q.argmin(0), :, images].mean(0)
        # multiplicative steps stay on the simplex; the largest slope is subtracted against overflow
        weights = weights * np.exp((slope - slope.max()) / (1 + step) ** 0.5)
        weights = weights / weights.sum()
        candidates.append(weights)
    # the iterates circle the optimum: their mean is often better than any
    candidates.append(np.mean(candidates[-steps // 2 :], axis=0))
    values = [float(worst_over(corrects, c).mean()) for c in candidates]
    best = int(np.argmax(values))
    return candidates[best], values[best]


def member_measures(
    subject: Subject, threat: Threat, worst: Bools, *, seed: int, progress: Progress = SILENT
) -> tuple[dict[str, Any], Cell]:
    """Transfer, diversity and accuracy over eps, and the points that were tried at the threat.

    Expensive measurements are distributed over the subject's processes; each returns all results.
    """
    ensemble, x, y = subject.ensemble, subject.x[:MEASURED], subject.y[:MEASURED]
    tried, attacked = Tried(ensemble, x, y, threat), subject.metered(Meter())
    right = torch.from_numpy(tried.clean.correct).to(x.device)
    common = right.all(0)
    jobs: list[Callable[[Tried], Any]] = [
        lambda tried: _costed_curve(subject, x, y, threat, worst, tried, seed=seed),
        *(
            partial(convention.row, attacked, m, x, y, common, threat, seed=seed)
            for convention in CONVENTIONS.values()
            for m in range(ensemble.num_members)
        ),
    ]
    own = subject.workers.share(jobs)
    progress.begin(MEASURES, len(jobs), share=len(own), unit="parts")
    results = []
    for job in own:
        # a job must not see points of others, which depend on the number of processes
        apart = tried.fork()
        results.append((job(apart), apart.cell))
        progress.advance(1, 0.0)
    # summed in a fixed order, so that the result does not depend on the number of processes
    ((falling, cost), points), *others = subject.workers.gather(results)
    for cell in (points, *(cell for _, cell in others)):
        tried.add(cell)
    rows = [row for row, _ in others]
    conventions = {
        name: convention.table(rows[i * len(right) : (i + 1) * len(right)], common, threat)
        for i, (name, convention) in enumerate(CONVENTIONS.items())
    }
    found = {
        "curve": falling,
        "curve_cost": cost,
        "transfer": conventions["dverge"]["matrix"],
        "transfer_conventions": conventions,
        "diversity": {
            **_diversity_of_all(ensemble, x, y),
            "clean": pair_statistics(right.cpu().numpy()),
            "images": len(x),
        },
    }
    return found, tried.cell


def _costed_curve(
    subject: Subject, x: Images, *more: Any, seed: int
) -> tuple[list[list[float]], dict[str, Any]]:
    """The `curve`, the number of its images and the number of passes per image."""
    meter = Meter()
    rows = curve(subject.metered(meter), x, *more, seed=seed)
    count = max(1, len(x))
    return rows, {
        "attack": repr(ATTACKS["hinge"]()),
        "images": len(x),
        "radii": len(rows) - 1,
        "forwards": meter.forwards / count,
        "backwards": meter.backwards / count,
    }


def curve(
    ensemble: Ensemble,
    x: Images,
    y: Labels,
    threat: Threat,
    worst: Bools,
    tried: Tried,
    *,
    seed: int,
) -> list[list[float]]:
    """Accuracy of the sampled ensemble over eps, from 0 until the accuracy is 0.

    Hinge-20 at each eps. A fooled image stays fooled at larger eps, since the larger ball contains
    the point. An image that fools all members is not attacked again. From the threat's own eps on,
    the suite's worst case counts too. Points within the threat are added to `tried`.

    Returns:
        Rows (eps, accuracy, low, high).
    """
    mixture = ensemble.probabilities()
    # a threat of 0 has no scale of its own
    unit = threat.eps or 1 / 255
    largest = 1.0 if threat.norm == math.inf else float(x[0].numel()) ** 0.5
    grid = [0.0, *(unit * k for k in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32))]
    grid = [eps for eps in grid if eps < largest] + [largest]
    lowest, table = exact_expectation(tried.clean.correct, mixture), []
    for eps in grid:
        at = Threat(norm=threat.norm, eps=eps)
        for left in _parts(torch.from_numpy(lowest > EQUAL), x) if eps > 0 else ():
            # the same stream for each part: an image's numbers do not depend on the part
            rng = stream(seed, "curve", f"{eps:.9g}")
            points = ATTACKS["hinge"]()(ensemble, x[left], y[left], at, rng=rng)
            rows = left.cpu().numpy()
            # points of a larger ball must not count for the headline
            within = eps <= threat.eps
            hits = (
                tried.offer(points, left).correct[:, rows] if within else tried.judged(points, left)
            )
            lowest[rows] = np.minimum(lowest[rows], exact_expectation(hits, mixture))
        # a larger threat than the box has the same points
        if eps >= min(threat.eps, largest):
            lowest = np.minimum(lowest, exact_expectation(worst[:, : len(x)], mixture))
        estimate = accuracy_interval(lowest)
        table.append([float(v) for v in (eps, *estimate) if v is not None])
        if estimate.value == 0:
            break
    return table


def _parts(rows: Bool[Tensor, " B"], x: Images) -> Iterator[Bool[Tensor, " B"]]:
    """Masks of at most a chunk of the chosen images; of all chosen ones where they are small."""
    size = chunk_size(x.shape[1:])
    chosen = rows.nonzero().flatten()
    for some in chosen.split(MEASURED if size == CHUNK else size):
        if len(some):
            part = torch.zeros(len(x), dtype=torch.bool)
            part[some] = True
            yield part.to(x.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """How a published transfer matrix was measured.

    Attributes:
        steps, step_size: of PGD on one member; the step is a fraction of eps.
        starts: random starts; another member counts as fooled if any of them fools it.
        only_correct: skip images that some member misclassifies when clean.
    """

    steps: int
    step_size: float
    starts: int
    only_correct: bool

    @property
    def attack(self) -> PGD:
        """The attack on one member."""
        return PGD(
            steps=self.steps, step_size=self.step_size, keep_best=False, loss="cross_entropy"
        )

    def row(
        self,
        ensemble: Ensemble,
        source: int,
        x: Images,
        y: Labels,
        common: Bool[Tensor, " B"],
        threat: Threat,
        tried: Tried,
        *,
        seed: int,
    ) -> list[float]:
        """Shares of adversarial images of member `source` that fool each member and the average.

        `common` marks the images that all members classify correctly. All points are added to
        `tried`.
        """
        rows = common if self.only_correct else torch.ones_like(common)
        if not rows.any():
            return []
        fooled = np.zeros((ensemble.num_members + 1, len(x)), dtype=bool)
        for start in range(self.starts):
            for part in _parts(rows.cpu(), x):
                # the same random stream for every member, so that equal members get equal attacks
                rng = stream(seed, "transfer", self.steps, start)
                x_adv = self.attack(ensemble.member(source), x[part], y[part], threat, rng=rng)
                found = tried.offer(x_adv, part)
                right = np.concatenate([found.correct, found.averaged[None]])
                fooled[:, found.met] |= ~right[:, found.met]
        shares: list[float] = fooled[:, rows.cpu().numpy()].mean(1).tolist()
        return shares

    def table(
        self, rows: Sequence[Sequence[float]], common: Bool[Tensor, " B"], threat: Threat
    ) -> dict[str, Any]:
        """The rows of all source members as one record.

        Returns:
            "matrix" (M rows of M shares; None without images), "ensemble" (M shares that fool the
            averaged ensemble), "images" and "settings".
        """
        images = int(common.sum()) if self.only_correct else len(common)
        return {
            "matrix": [row[:-1] for row in rows] if images else None,
            "ensemble": [row[-1] for row in rows] if images else None,
            "images": images,
            "settings": f"{self.attack!r}, {self.starts} starts, eps {eps_text(threat.eps)}"
            + (", images that all members answer correctly" if self.only_correct else ""),
        }


CONVENTIONS: Final = {
    "dverge": Convention(steps=50, step_size=0.2, starts=5, only_correct=True),
    "trs": Convention(steps=5, step_size=0.1, starts=1, only_correct=False),
}
"""The two published conventions: fooling rates among images that all members classify correctly,
or error rates."""


def _diversity_of_all(ensemble: Ensemble, x: Images, y: Labels) -> dict[str, float | None]:
    """`gradient_diversity` from parts of the images: all its figures are means over images."""
    parts = list(_parts(torch.ones(len(x), dtype=torch.bool), x))
    found = [gradient_diversity(ensemble, x[part], y[part]) for part in parts]
    shares = [float(part.double().mean()) for part in parts]

    def mean(values: Sequence[float | None]) -> float | None:
        pairs = zip(shares, values, strict=True)
        return math.fsum(w * v for w, v in pairs if v is not None) if None not in values else None

    return {key: mean([part[key] for part in found]) for key in found[0]}


def gradient_diversity(ensemble: Ensemble, x: Images, y: Labels) -> dict[str, float | None]:
    """Similarity of the members' gradients and of their wrong predictions on clean images.

    cosine, abs_cosine: mean over pairs of the input gradients' (absolute) cosine. coherence: GAL's
    log of the sum over pairs of exp(cosine). gradient_norm: mean length. log_det: ADP's log
    determinant of the members' normalised wrong-class probabilities; None where members are too
    many for it (M > C - 1). entropy: of the mean probability, in nats.
    """
    grads = input_gradients(ensemble, x, y)
    with torch.no_grad():
        probs = ensemble.member_logits(x).double().softmax(-1)
    mean = probs.mean(0)
    # against log(0), as in `penalties.ensemble_entropy`
    entropy = float(-(mean * mean.clamp_min(1e-20).log()).sum(-1).mean())
    found: dict[str, float | None] = {"gradient_norm": float(lipschitz(grads)), "entropy": entropy}
    num_members, classes = len(probs), probs.shape[-1]
    if num_members < 2:
        return found | dict.fromkeys(("cosine", "abs_cosine", "coherence", "log_det"))
    rows, columns = torch.triu_indices(num_members, num_members, 1)
    cosines = pairwise_cosines(grads)[:, rows, columns]
    others = torch.ones_like(mean, dtype=torch.bool).scatter(1, y[:, None], False)
    wrong = probs[:, others].view(num_members, len(x), classes - 1).transpose(0, 1)
    wrong = F.normalize(wrong, dim=-1)
    # equal members would have determinant 0, and its logarithm would be -inf
    gram = wrong @ wrong.mT + 1e-6 * torch.eye(num_members, dtype=wrong.dtype, device=x.device)
    return found | {
        "cosine": float(cosines.mean()),
        "abs_cosine": float(gradient_similarity(grads)),
        "coherence": float(cosines.logsumexp(1).mean()),
        "log_det": float(torch.linalg.slogdet(gram)[1].mean()) if num_members < classes else None,
    }


def input_gradients(ensemble: Ensemble, x: Images, y: Labels) -> Float[Tensor, "M B D"]:
    """Each member's gradient of the summed cross-entropy w.r.t. each image; 0 where there is none.

    Gradients of the members' weights are not computed.
    """
    grads = []
    with frozen_weights(ensemble), torch.enable_grad():
        for m in range(ensemble.num_members):
            point = x.detach().clone().requires_grad_()
            # summed, so that the gradient of an image does not depend on the batch
            loss = F.cross_entropy(ensemble.logits_of(m, point), y, reduction="sum")
            with differentiating():
                grad = (
                    torch.autograd.grad(loss, point)[0] if loss.requires_grad else x.new_zeros(())
                )
            grads.append(grad.expand_as(x).flatten(1))
    return torch.stack(grads)

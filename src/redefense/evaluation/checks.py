"""Sanity checks of an evaluation (S-numbers): each a pass or a fail with its figure.

A failed check says that a number of this evaluation may be too kind to the defence, or wrong.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.ensembles import frozen_weights
from redefense.evaluation.metrics import exact_expectation, worst_case
from redefense.rng import stream
from redefense.threat import Threat
from redefense.types import Ensemble

SAMPLE = 32
"""Images on which the checks that need passes of their own look."""

GAP_POINTS = 5.0


@runtime_checkable
class Records(Protocol):
    """Per-image records of one cell."""

    @property
    def correct(self) -> NDArray[np.bool_]: ...

    @property
    def linf(self) -> NDArray[np.float64]: ...


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the list.

    Attributes:
        id: S01 to S40.
        passed: green or red; None if there was nothing to check.
        detail: the figure it rests on.
    """

    id: str
    passed: bool | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "passed": self.passed, "detail": self.detail}


def before_run(ensemble: Ensemble, x: Tensor, y: Tensor) -> list[Check]:
    """Checks of the victim itself."""
    x, y = x[:SAMPLE], y[:SAMPLE]
    return [
        _side_effects(ensemble, x, y),
        _output_kind(ensemble, x),
        _zero_gradients(ensemble, x, y),
    ]


def after_run(
    ensemble: Ensemble,
    x: Tensor,
    y: Tensor,
    data: Mapping[str, Any],
    records: Mapping[str, Records],
    mixture: NDArray[np.float64],
    *,
    full: bool,
    seed: int,
) -> list[Check]:
    """Checks of the records; with `full` also those that need attacks of their own."""
    cells: Sequence[Mapping[str, Any]] = data["cells"]
    q = {name: exact_expectation(record.correct, mixture) for name, record in records.items()}
    checks = [
        Check("S01", True, f"{len(cells)} cells verified inside box and budget"),
        _fgsm_is_weaker(cells, q),
        _aware_is_stronger(data["headline"], cells, q),
        _worst_is_lowest(cells, q),
        _draws_agree(cells, len(x)),
        _ordering(cells),
        _unchanged(cells, records, q["clean"]),
        _gap(data["headline"]),
        _helps(data["headline"]),
    ]
    if full:
        checks += [_zero_budget(ensemble, x[:SAMPLE], y[:SAMPLE], seed)]
        checks += _large_budgets(ensemble, x[:SAMPLE], y[:SAMPLE], seed)
        checks += [_repeats(ensemble, x[:SAMPLE], y[:SAMPLE], seed)]
    return sorted(checks, key=lambda check: check.id)


def _side_effects(ensemble: Ensemble, x: Tensor, y: Tensor) -> Check:
    module = cast(nn.Module, ensemble)
    with unchanged_state(module) as changes:
        ATTACKS["pgd"]()(module, x, y, Threat(eps=0.1), rng=stream(0, "S05"))
    return Check("S05", not changes(), ", ".join(changes()) or "an attack left no trace")


@contextmanager
def unchanged_state(module: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Yields a function that names what has changed since the block began."""

    def snapshot() -> dict[str, Any]:
        return {
            "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
            "requires_grad": [p.requires_grad for p in module.parameters()],
            "modes": [child.training for child in module.modules()],
            "buffers": [b.clone() for b in module.buffers()],
            "torch's generator": torch.get_rng_state(),
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


def _output_kind(ensemble: Ensemble, x: Tensor) -> Check:
    with torch.no_grad():
        logits = ensemble.member_logits(x)
    sums = logits.sum(-1)
    probabilities = bool((logits >= 0).all()) and bool((sums - 1).abs().max() < 1e-4)
    if probabilities:
        return Check("S07", False, "members return probabilities; attacks need logits")
    finite = bool(logits.isfinite().all())
    return Check("S07", finite, "members return logits" if finite else "non-finite outputs")


def _zero_gradients(ensemble: Ensemble, x: Tensor, y: Tensor) -> Check:
    """S22: at the images, per member, in the precision and with the loss that attacks use."""
    lost = 0
    with frozen_weights(cast(nn.Module, ensemble)), torch.enable_grad():
        for m in range(ensemble.num_members):
            point = x.detach().clone().requires_grad_()
            loss = F.cross_entropy(ensemble.logits_of(m, point), y, reduction="sum")
            if not loss.requires_grad:
                lost += len(x)
                continue
            (grad,) = torch.autograd.grad(loss, point)
            size = grad.flatten(1).abs().amax(1)
            lost += int((~(size > 0) | ~size.isfinite()).sum())
    total = ensemble.num_members * len(x)
    return Check("S22", lost == 0, f"{lost} of {total} input gradients are zero or not finite")


def _mean(q: Mapping[str, NDArray[np.float64]], name: str) -> float:
    return float(q[name].mean())


def _tolerance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Two paired standard errors."""
    return 2 * float(np.std(a - b, ddof=1)) / len(a) ** 0.5 if len(a) > 1 else 1.0


def _fgsm_is_weaker(
    cells: Sequence[Mapping[str, Any]], q: Mapping[str, NDArray[np.float64]]
) -> Check:
    single = [c for c in cells if c["attack"] == "fgsm"]
    iterated = [c for c in cells if c["attack"] in ("pgd", "apgd")]
    pairs = [
        (a["id"], b["id"])
        for a in single
        for b in iterated
        if a["threat"] == b["threat"] and a["view"] == b["view"]
    ]
    if not pairs:
        return Check("S16", None, "no single step to compare with")
    bad = [f"{b} > {a}" for a, b in pairs if _mean(q, b) > _mean(q, a) + _tolerance(q[a], q[b])]
    return Check("S16", not bad, "; ".join(bad) or "iterated attacks are not weaker than FGSM")


def _aware_is_stronger(
    headline: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    q: Mapping[str, NDArray[np.float64]],
) -> Check:
    aware = [_mean(q, c["id"]) for c in cells if c["aware"] and c["bounded"]]
    unaware = [_mean(q, c["id"]) for c in cells if not c["aware"] and c["bounded"]]
    if not aware or not unaware:
        return Check("S20", None, "needs attacks of both kinds")
    worst = headline["aware"]
    if worst is None:
        return Check("S20", None, "no common threat")
    return Check(
        "S20",
        worst <= min(unaware) + 1e-9,
        f"worst case {100 * worst:.1f} %, strongest unaware attack {100 * min(unaware):.1f} %",
    )


def _worst_is_lowest(
    cells: Sequence[Mapping[str, Any]], q: Mapping[str, NDArray[np.float64]]
) -> Check:
    bounded = [c["id"] for c in cells if c["bounded"]]
    worst = worst_case([q["clean"], *(q[name] for name in bounded)])
    lower = [name for name in bounded if _mean(q, name) < worst.mean() - 1e-12]
    return Check("S21", not lower, "the per-image minimum is at most every single attack")


def _draws_agree(cells: Sequence[Mapping[str, Any]], count: int) -> Check:
    """S31: five protocol draws of n images against the exact expectation, three standard errors."""
    bad = []
    for cell in cells:
        accuracy = cell["accuracy"]
        # a draw is right with probability q_i: its variance is at most that of a fair coin
        bound = 3 * 0.5 / (5 * count) ** 0.5
        if abs(accuracy["protocol"] - accuracy["expected"]) > bound:
            bad.append(cell["id"])
    return Check("S31", not bad, "protocol draws agree with exact expectations" if not bad else
                 f"draws and expectation differ in {', '.join(bad)}")  # fmt: skip


def _ordering(cells: Sequence[Mapping[str, Any]]) -> Check:
    bad = []
    for cell in cells:
        a = cell["accuracy"]
        chain = [a["all"], a["worst_member"], a["expected"], a["best_member"], a["any"]]
        if any(low > high + 1e-9 for low, high in itertools.pairwise(chain)):
            bad.append(cell["id"])
    return Check("S33", not bad, ", ".join(bad) or "all <= worst <= expected <= best <= any")


def _unchanged(
    cells: Sequence[Mapping[str, Any]], records: Mapping[str, Records], clean: NDArray[np.float64]
) -> Check:
    worth = clean > 0
    shares = {
        c["id"]: float((records[c["id"]].linf[worth] <= 1e-6).mean()) if worth.any() else 0.0
        for c in cells
        if c["bounded"] and c["threat"]["eps"] > 0
    }
    bad = [f"{name} {100 * share:.0f} %" for name, share in shares.items() if share > 0]
    return Check("S34", not bad, "returned unchanged: " + (", ".join(bad) or "none"))


def _gap(headline: Mapping[str, Any]) -> Check:
    unaware, aware = headline["unaware"], headline["aware"]
    if unaware is None or aware is None:
        return Check("S36", None, "no pair of headlines")
    gap = 100 * (unaware - aware)
    return Check(
        "S36",
        gap <= GAP_POINTS,
        f"knowing of the draw takes {gap:.1f} points more (flag above {GAP_POINTS:g})",
    )


def _helps(headline: Mapping[str, Any]) -> Check:
    aware, single = headline["aware"], headline.get("best_single_member")
    if aware is None or single is None:
        return Check("S38", None, "no single member to compare with")
    return Check(
        "S38",
        aware > single,
        f"sampled {100 * aware:.1f} %, best single member {100 * single:.1f} % (worst cases)",
    )


def _hits(ensemble: Ensemble, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return ensemble.member_logits(x).argmax(-1) == y


def _zero_budget(ensemble: Ensemble, x: Tensor, y: Tensor, seed: int) -> Check:
    module = cast(nn.Module, ensemble)
    x_adv = ATTACKS["meanprob_pgd"]()(module, x, y, Threat(eps=0.0), rng=stream(seed, "S02"))
    same = torch.equal(_hits(ensemble, x_adv, y), _hits(ensemble, x, y))
    return Check(
        "S02", same, "eps = 0 gives the clean answers" if same else "eps = 0 changes answers"
    )


def _large_budgets(ensemble: Ensemble, x: Tensor, y: Tensor, seed: int) -> list[Check]:
    """S12 and S13: within 0.5 any image can become grey; unbounded, nothing may stand."""
    module, checks = cast(nn.Module, ensemble), []
    for name, eps in (("S12", 0.5), ("S13", 1.0)):
        threat = Threat(eps=eps)
        x_adv = ATTACKS["meanprob_pgd"]()(module, x, y, threat, rng=stream(seed, name))
        hits = _hits(ensemble, x_adv, y).double()
        accuracy = float((ensemble.mixture.to(hits) @ hits).mean())
        with torch.no_grad():
            classes = ensemble.logits_of(0, x[:1]).shape[1]
        allowed = 1 / classes + 2 * 0.5 / len(x) ** 0.5 if eps < 1 else 0.0
        checks.append(
            Check(name, accuracy <= allowed, f"eps {eps:g} leaves {100 * accuracy:.1f} %")
        )
    return checks


def _repeats(ensemble: Ensemble, x: Tensor, y: Tensor, seed: int) -> Check:
    module, threat = cast(nn.Module, ensemble), Threat(eps=0.1)
    first, second = (
        ATTACKS["pgd"]()(module.averaged(), x, y, threat, rng=stream(seed, "S09"))  # type: ignore[operator]  # an ensemble's view
        for _ in range(2)
    )
    return Check("S09", torch.equal(first, second), "same seed, same bits")

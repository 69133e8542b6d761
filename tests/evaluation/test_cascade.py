"""Everything that was run counts, and images that are lost need no further attack."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redefense.attacks.adaptive import MeanProbPGD
from redefense.attacks.subset import Subset
from redefense.checks.attacks import black_box
from redefense.config import ThreatConfig
from redefense.ensembles import Independent
from redefense.evaluation import full_checks
from redefense.evaluation.api import evaluate
from redefense.evaluation.cascade import points as handover
from redefense.evaluation.cascade.runner import run_order
from redefense.evaluation.cascade.worst_case import WorstCase
from redefense.evaluation.cells import Cell, Subject
from redefense.evaluation.plan import plan_of
from redefense.evaluation.report_object import Report
from redefense.evaluation.run import run_suite
from redefense.evaluation.suite import CellSpec, Suite
from redefense.results.intervals import exact_expectation
from redefense.rng import CHUNK, stream
from redefense.threat import Threat

pytestmark = pytest.mark.usefixtures("without_victim_checks")

EPS = 0.15
THREAT = ThreatConfig(eps=EPS)


def cell(attack: str, view: str = "members", **settings: Any) -> CellSpec:
    return CellSpec(attack=attack, view=view, settings=settings)  # type: ignore[arg-type]  # a text


FIRST = (
    cell("pgd", "sampled", steps=2),
    cell("meanprob_pgd", steps=3),
    cell("hinge", steps=4),
)
BESIDE = (cell("hinge", steps=6), cell("apgd", steps=5))
INDEPENDENT = Suite(name="mine", cells=FIRST, baseline_attacks=BESIDE, cascade=True)
BRIEF: dict[str, Any] = {"num_targets": 1, "mixed": 1, "subsets": 2}
HANDING_ON = Suite(name="mine", cells=(*FIRST, cell("subset", steps=4, **BRIEF)), cascade=True)


def members(count: int, *, pixels: int = 9, classes: int = 4) -> list[nn.Module]:
    """Small networks with kinks, so that attacks differ."""
    made: list[nn.Module] = []
    rng = stream(0, "members")
    for _ in range(count):
        layers = nn.Linear(pixels, 12), nn.ReLU(), nn.Linear(12, classes)
        for p in (p for layer in layers for p in layer.parameters()):
            p.data.normal_(generator=rng)
        made.append(nn.Sequential(nn.Flatten(), *layers))
    return made


def subject(count: int = 60, mixture: list[float] | None = None, num: int = 3) -> Subject:
    ensemble = Independent(members(num), mixture).eval().double()
    x = torch.rand(count, 1, 3, 3, generator=stream(0, "images"), dtype=torch.float64)
    y = ensemble.averaged()(x).argmax(1)
    y[::10] = (y[::10] + 1) % 4  # some are wrong as they are
    return Subject(ensemble, x, y, np.arange(count), "made up")


TWO_CHUNKS = CHUNK + 20


def run(suite: Suite, **settings: Any) -> Report:
    return run_suite(settings.pop("subject", None) or subject(), suite, THREAT, **settings)


def bits(report: Report) -> dict[str, Any]:
    """All that does not depend on the clock."""
    data = {**report.data, "provenance": None}
    data["cells"] = [{k: v for k, v in c.items() if k != "seconds"} for c in data["cells"]]
    arrays = {
        f"{name} {key}": getattr(record, key).tolist()
        for name, record in report.cells.items()
        for key in ("correct", "averaged", "met", "alone", "linf")
    }
    return data | arrays


def lowest(report: Report) -> Any:
    mixture = np.array(report.data["mixture"])
    return np.min([exact_expectation(r.correct, mixture) for r in report.cells.values()], axis=0)


def test_the_headline_is_that_of_attacks_on_all_images() -> None:
    with_cascade, without = run(INDEPENDENT), run(INDEPENDENT.cascading(False))
    assert with_cascade.headline == without.headline
    assert lowest(with_cascade).tolist() == lowest(without).tolist()
    unaware, first, second = (with_cascade.cells[c["id"]] for c in with_cascade.data["cells"])
    assert unaware.whole
    # clean images that nobody knows are not attacked, nor are those that the cells before took
    mixture = np.array(with_cascade.data["mixture"])
    q = exact_expectation(with_cascade.cells["clean"].correct, mixture)
    for record in (unaware, first, second):
        if record is not unaware:
            assert record.met.tolist() == (q > 0).tolist()
            assert not record.correct[:, ~record.met].any()
        q = np.minimum(q, exact_expectation(record.correct, mixture))
    assert 0 < second.met.sum() < first.met.sum() < 60
    assert [c["met"] for c in with_cascade.data["cells"]] == [
        60, first.met.sum(), second.met.sum(),
    ]  # fmt: skip
    assert {c["met"] for c in without.data["cells"]} == {60}


def test_a_member_of_probability_zero_keeps_no_image_and_is_judged_for_itself() -> None:
    mixture = [0.5, 0.5, 0.0]
    with_cascade, without = (
        run(INDEPENDENT.cascading(cascade), subject=subject(mixture=mixture))
        for cascade in (True, False)
    )
    assert with_cascade.headline["aware"] == without.headline["aware"]
    met = with_cascade.cells["hinge-members-linf-0.15"].met
    clean = with_cascade.cells["clean"].correct
    assert (clean[2] & ~clean[:2].any(0) & ~met).any()  # it alone is right: the image is lost
    alone = with_cascade.headline["single_members"]
    assert alone[2] > 0
    assert alone[:2] == without.headline["single_members"][:2]


def test_everything_that_was_run_counts_and_no_figure_lies_below_aware(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(full_checks, "JOBS", (lambda sample: [black_box(sample)],))
    suite = HANDING_ON.model_copy(update={"baseline_attacks": BESIDE, "measures": True})
    report = run(suite, subject=subject(20, num=2), checks="full", seeds=2)
    data, headline = report.data, report.headline
    aware = headline["aware"]
    assert aware == pytest.approx(lowest(report).mean())
    assert {c["id"] for c in data["further_cells"]} >= {
        "measures", "checks", "hinge-members-linf-0.15.seed1", "member-0-apgd-1",
    }  # fmt: skip
    figures = [c["accuracy"]["expected"] for c in (*data["cells"], *data["further_cells"])]
    figures += [value for c in data["cells"] for value in c["seeds"]["expected"]]
    figures += [headline["unaware"], data["clean"]["expected"]]
    figures += [row[1] for row in data["curve"] if row[0] <= EPS + 1e-9]
    assert aware <= min(figures) + 1e-12
    # what single members allow holds exactly, since each point is put to all of them
    alone = np.array(headline["single_members"])
    assert alone.mean() - 1e-12 <= aware <= 1 - (1 - alone).max() / 2 + 1e-12
    # a member's own attacks and the matrix of transfer agree about it
    for m, row in enumerate(data["transfer_conventions"]["trs"]["matrix"]):
        assert alone[m] <= 1 - row[m] + 1e-12
    checks = {c["id"]: c["passed"] for c in data["checks"]}
    assert checks["S21"] is checks["B1"] is True


SHORT = (cell("hinge", steps=1, step_size=0.01),)


@pytest.mark.parametrize(
    ("cells", "passed"),
    [(SHORT, False), ((*SHORT, cell("subset", steps=1, num_targets=0, mixed=1)), True)],
    ids=["short", "enough"],
)
def test_a_suite_whose_attacks_stop_early_is_caught(
    cells: tuple[CellSpec, ...], passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_checks, "JOBS", ())
    suite = Suite(name="mine", cells=cells, cascade=True)
    quick, full = (run(suite, subject=subject(12, num=2), checks=c) for c in ("quick", "full"))
    (check,) = [c for c in full.data["checks"] if c["id"] == "S44"]
    assert check["passed"] is passed
    # what it found counts
    mixture = np.array(full.data["mixture"])
    stronger = [c["id"] for c in full.data["further_cells"] if c["id"].startswith("stronger")]
    left = [exact_expectation(full.cells[name].correct, mixture) for name in stronger]
    drop = quick.headline["aware"] - min(np.min(left, axis=0).mean(), quick.headline["aware"])
    assert f"accuracy {100 * drop:.1f} points lower" in check["detail"]
    assert full.headline["aware"] <= quick.headline["aware"] - drop + 1e-12


def test_one_network_its_average_and_its_draw_are_one() -> None:
    headline = run(INDEPENDENT, subject=subject(num=1)).headline
    aware = headline["aware"]
    assert headline["single_members"] == [aware]
    assert headline["best_single_member"] == headline["averaged"] == aware


class Stop(BaseException):
    """An interrupt by Ctrl-C."""


def test_what_goes_on_in_the_middle_of_a_cascade_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = subject(TWO_CHUNKS)
    whole = bits(run(HANDING_ON, subject=who))
    for kind, name in ((MeanProbPGD, "perturb"), (Subset, "perturb_from")):
        store, calls, original = tmp_path / kind.__name__, [0], getattr(kind, name)

        def perturb(*given: Any, calls: Any = calls, original: Any = original, **n: Any) -> Tensor:
            if calls[0] == 1:
                raise Stop
            calls[0] += 1
            found: Tensor = original(*given, **n)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(kind, name, perturb)
            with pytest.raises(Stop):
                run(HANDING_ON, subject=who, store=store)
        assert bits(run(HANDING_ON, subject=who, store=store)) == whole
    # a record that is lost is made again, from points that are made again
    (store / "subset-members-linf-0.15.npz").unlink()
    assert bits(run(HANDING_ON, subject=who, store=store)) == whole
    assert not [path for path in store.iterdir() if path.is_dir()]


def test_a_record_of_other_images_is_made_again(tmp_path: Path) -> None:
    whole = bits(run(INDEPENDENT, store=tmp_path / "mine"))
    path = tmp_path / "mine" / "hinge-members-linf-0.15.npz"
    record = Cell.read(path)
    assert record is not None
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"met": ~record.met})
    assert bits(run(INDEPENDENT, store=tmp_path / "mine")) == whole


def test_an_attack_begins_from_the_worst_point_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Tensor] = []
    original = Subset.perturb_from

    def watched(self: Any, victim: Any, x: Tensor, y: Tensor, t: Any, starts: Any, **n: Any) -> Any:
        given.append(starts)
        return original(self, victim, x, y, t, starts, **n)

    monkeypatch.setattr(Subset, "perturb_from", watched)
    who = subject()
    report = run(HANDING_ON, subject=who)
    before = [report.cells[c["id"]] for c in report.data["cells"][:-1]]
    mixture = np.array(report.data["mixture"])
    q = np.min(
        [exact_expectation(r.correct, mixture) for r in (report.cells["clean"], *before)], axis=0
    )
    met = report.cells["subset-members-linf-0.15"].met
    points, y = torch.cat(given, dim=1)[0], who.y[torch.from_numpy(met)]
    assert len(points) == met.sum()
    hits = (who.ensemble.member_logits(points).argmax(-1) == y).numpy()
    assert exact_expectation(hits, mixture).tolist() == q[met].tolist()
    # where the points of all images would take too much room, the last ones begin as they are
    given.clear()
    monkeypatch.setattr(handover, "LIMIT", 40 * 9 * 8)
    run(HANDING_ON, subject=who)
    clean = who.x[torch.from_numpy(met)]
    late = met.nonzero()[0] >= 40
    assert late.any()
    assert torch.equal(torch.cat(given, dim=1)[0][late], clean[late])


def test_black_boxes_run_last_and_unaware_attacks_before_the_others() -> None:
    cells = (cell("square", "averaged", queries=5), cell("hinge"), cell("pgd", "averaged"))
    order = run_order(plan_of(Suite(name="mine", cells=cells), THREAT, True))
    assert [p.spec.attack for p in order] == ["pgd", "hinge", "square"]


def test_lost_means_that_every_member_that_can_be_drawn_errs() -> None:
    clean = np.array([[1, 0, 0], [0, 0, 1], [1, 1, 1]], dtype=bool)
    zeros = np.zeros(3)
    record = Cell(correct=clean, averaged=clean[0], linf=zeros, l2=zeros, l0=zeros)
    worst = WorstCase(np.array([0.5, 0.5, 0.0]), record)
    assert worst.lost.tolist() == [False, True, False]
    point = Cell(
        correct=clean & False, averaged=clean[0] & False, linf=zeros, l2=zeros, l0=zeros,
        met=np.array([True, False, False]),
    )  # fmt: skip
    filled = worst.filled(point)
    # lost: wrong for all; not met and not lost: as it stood
    assert filled.correct.T.astype(int).tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 1]]
    worst.add("point", point)
    assert worst.lost.tolist() == [True, True, False]
    assert worst.source == ["point", "clean", "clean"]
    assert worst.alone.T.astype(int).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1]]


def test_a_cascade_can_be_chosen_where_an_evaluation_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(INDEPENDENT.model_dump_json())
    who = subject(40)
    reports = {
        cascade: evaluate(
            cast(nn.Module, who.ensemble), (who.x, who.y), str(tmp_path / "mine.json"),
            Threat(eps=EPS), cascade=cascade,
        )
        for cascade in (None, True, False)
    }  # fmt: skip
    met = {key: [c["met"] for c in report.data["cells"]] for key, report in reports.items()}
    assert met[None] == met[True] != met[False] == [40, 40, 40]
    # tables give no accuracy of an attack that did not meet all images
    for key, report in reports.items():
        own = [row["accuracy"] is not None for row in report.rows()]
        assert own == [True, *(count == 40 for count in met[key])]
        assert report.to_latex().count("met ") == own.count(False)

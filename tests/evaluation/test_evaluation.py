"""The harness: hand-made ensembles whose every figure is known are scored exactly."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.attacks.gradient import FGSM, PGD
from redefense.audit.audit import audit
from redefense.config import ThreatConfig
from redefense.ensembles import Independent
from redefense.errors import ConfigError, InputError
from redefense.evaluation.api import evaluate
from redefense.evaluation.cells import Cell, Subject, Task, verify_ball
from redefense.evaluation.plan import attack_of, plan_of
from redefense.evaluation.run import run_suite
from redefense.evaluation.suite import SUITES, CellSpec, Suite, suite_named
from redefense.results.join import join
from redefense.rng import stream
from redefense.threat import Threat

EPS = 0.2


class Ramp(nn.Module):
    """Class 1 if a pixel is above one half: its distance to the boundary can be read off."""

    def __init__(self, pixel: int = 0, sign: float = 1.0) -> None:
        super().__init__()
        self.pixel = pixel
        self.weight = nn.Parameter(torch.tensor(4.0 * sign))

    def forward(self, x: Tensor) -> Tensor:
        z = self.weight * (x.flatten(1)[:, self.pixel] - 0.5)
        return torch.stack([-z, z], 1)


class Constant(nn.Module):
    """Always answers one class; its output does not depend on the image."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 2, dtype=x.dtype)
        logits[:, self.answer] = 1.0
        return logits


class Viewing(nn.Module):
    """A small network that reads its features as they lie in memory, or wherever they lie."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.views = views
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3, generator=rng))
        self.head = nn.Parameter(torch.randn(10, 4 * 64, generator=rng))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.nn.functional.conv2d(x, self.kernel, padding=1).relu()
        return (z.view(len(z), -1) if self.views else z.flatten(1)) @ self.head.T


def images(distances: list[float], side: float = 1.0) -> tuple[Tensor, Tensor]:
    """(n, 1, 2, 2) images at these distances on the side of class 1 (or 0) of every ramp."""
    value = 0.5 + side * torch.tensor(distances)
    return value[:, None, None, None].expand(-1, 1, 2, 2).clone(), torch.full(
        (len(distances),), int(side > 0)
    )


def quick(model: Any, x: Tensor, y: Tensor, **settings: Any) -> dict[str, Any]:
    return evaluate(model, (x, y), threat=Threat(eps=EPS), **settings).data


def test_a_saved_report_joins_to_its_own_headline_and_its_json_alone_says_what_it_lacks(
    tmp_path: Path,
) -> None:
    x, y = images([0.05, 0.15, 0.25, 0.35])
    report = evaluate([Ramp(), Ramp(1), Constant(1)], (x, y), threat=Threat(eps=EPS))
    assert report.save(tmp_path / "own") == tmp_path / "own" / "evaluation" / "quick.json"
    (result,) = join([tmp_path / "own"])
    headline = report.headline
    assert result.aware is not None
    assert result.single is not None
    assert result.aware.value == headline["aware"]
    assert result.aware[1:] == pytest.approx(headline["aware_interval"])
    assert result.single.value == headline["best_single_member"]
    assert result.over_averaged is not None  # paired, which needs every image's record
    assert not any("missing" in note for note in result.notes)
    assert "records-missing" not in {f.id for f in audit(tmp_path / "own")}

    alone = tmp_path / "alone.json"
    alone.write_text(report.to_json())
    (bare,) = join([alone])
    assert bare.over_averaged is None
    (note,) = [note for note in bare.notes if "missing" in note]
    assert "4 of 4 attacks" in note
    assert "report.save" in note
    (finding,) = [f for f in audit(alone) if f.id == "records-missing"]
    assert finding.severity == "note"
    attacks = report.data["cells"] + report.data["further_cells"]
    assert len(finding.rows) == len(attacks)


def test_a_report_is_saved_again_but_never_over_a_run_of_the_command_line(tmp_path: Path) -> None:
    x, y = images([0.1, 0.3])
    first = evaluate(Ramp(), (x, y), threat=Threat(eps=EPS))
    second = evaluate(Ramp(), (x, y), threat=Threat(eps=0.4))
    first.save(tmp_path)
    target = second.save(tmp_path)
    assert target.read_text() == second.to_json()
    assert join([tmp_path])[0].eps == 0.4
    (tmp_path / "evaluation" / "quick" / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"can be resumed .* and is not replaced"):
        first.save(tmp_path)
    assert target.read_text() == second.to_json()


def expected(data: dict[str, Any]) -> list[float]:
    return [cell["accuracy"]["expected"] for cell in data["cells"]]


def test_a_constant_classifier_keeps_its_accuracy_under_every_attack() -> None:
    x, _ = images([0.1] * 8)
    y = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    data = quick(Constant(0), x, y)
    assert expected(data) == [0.75] * 4
    assert data["clean"]["expected"] == 0.75
    assert data["headline"]["aware"] == data["headline"]["unaware"] == 0.75


def test_a_linear_classifier_falls_exactly_where_the_ball_reaches_the_boundary() -> None:
    x, y = images([0.05, 0.1, 0.15, 0.19, 0.21, 0.3, 0.4, 0.5])
    data = quick(Ramp(), x, y)
    assert expected(data) == [0.5] * 4
    assert data["clean"]["per_member"] == [1.0]
    headline = data["headline"]
    assert headline["aware"] == headline["best_single_member"] == headline["averaged"] == 0.5


def test_one_perfect_and_one_blind_member() -> None:
    x, y = images([0.5] * 6)
    data = quick([Ramp(), Constant(0)], x, y)
    for cell in data["cells"]:
        accuracy = cell["accuracy"]
        assert accuracy["expected"] == 0.5
        assert (accuracy["worst_member"], accuracy["best_member"]) == (0.0, 1.0)
        assert (accuracy["all"], accuracy["any"]) == (0.0, 1.0)
    headline = data["headline"]
    assert headline["aware"] == 0.5
    assert (headline["best_single_member"], headline["best_single_member_index"]) == (1.0, 0)
    assert headline["single_members"] == [1.0, 0.0]
    checks = {c["id"]: c for c in data["checks"]}
    assert checks["S38"]["passed"] is False
    # quick attacks every member alone, so the bounds are known: here both are 50 %
    assert checks["B1"]["passed"] is True
    assert "single members allow 50.0 to 50.0 %" in checks["B1"]["detail"]


def test_of_one_member_there_is_nothing_to_know() -> None:
    x, y = images([0.05, 0.15, 0.25])
    checks = {c["id"]: c["passed"] for c in quick(Ramp(), x, y)["checks"]}
    assert (checks["S36"], checks["S38"], checks["B1"]) == (None, None, None)


def test_a_network_that_refuses_its_images_is_one_line() -> None:
    class Picky(Ramp):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("expected 3 channels")

    with pytest.raises(InputError, match=r"cannot take images.*expected 3 channels"):
        quick(Picky(), *images([0.1, 0.2]))


def test_a_network_that_views_its_features_is_evaluated_as_one_that_does_not() -> None:
    views, flattens = (
        evaluate(Viewing(views=v), "digits", images=30, threat=Threat(eps=EPS)).data
        for v in (True, False)
    )
    assert views["clean"] == flattens["clean"]
    assert expected(views) == pytest.approx(expected(flattens), abs=0.04)


def test_a_mixture_weighs_the_members() -> None:
    x, y = images([0.5] * 4)
    data = quick([Ramp(), Constant(0)], x, y, mixture=[0.75, 0.25])
    assert expected(data) == [0.75] * 4
    alone = quick([Ramp(), Constant(0)], x, y, mixture=[1.0, 0.0])
    assert alone["cells"][0]["accuracy"]["worst_member"] == 1.0  # never asked, never counted


def test_copies_of_one_member_are_that_member() -> None:
    x, y = images([0.05, 0.15, 0.25, 0.35])
    ramp = Ramp()
    many, one = quick([ramp] * 3, x, y), quick(ramp, x, y)
    assert expected(many) == expected(one) == [0.5] * 4
    for cell in many["cells"]:
        assert cell["accuracy"]["protocol_sd"] == 0.0
        assert cell["accuracy"]["all"] == cell["accuracy"]["any"]
    assert many["headline"]["aware"] == many["headline"]["best_single_member"]


def test_members_that_no_point_fools_together_leave_half_to_chance() -> None:
    """Opposite slopes: whoever leaves the one boundary behind moves away from the other."""
    x, y = images([0.1] * 4)
    x[:, :, 1, 1] = 0.4  # the second member reads this pixel upside down
    data = quick([Ramp(0), Ramp(3, -1.0)], x, y)
    aware = [c for c in data["cells"] if c["aware"]]
    assert [c["accuracy"]["expected"] for c in aware] == [0.0, 0.0]  # two pixels: both can be moved
    x[:, :, 1, 1] = 0.6
    same_pixel = quick([Ramp(0), Ramp(0, -1.0)], x, y)
    assert same_pixel["clean"]["expected"] == 0.5
    assert same_pixel["headline"]["aware"] == 0.5


def test_aware_is_at_most_unaware_and_at_most_every_bounded_cell() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(40, 1, 2, 2, generator=generator)
    y = (x.flatten(1)[:, 0] > 0.5).long()
    data = quick([Ramp(0), Ramp(1), Ramp(2)], x, y)
    headline = data["headline"]
    assert headline["aware"] <= headline["unaware"] <= data["clean"]["expected"]
    assert headline["aware"] <= min(expected(data)) + 1e-12
    low, high = headline["aware_interval"]
    assert low <= headline["aware"] <= high


def test_equal_seeds_give_equal_reports_and_other_seeds_other_draws() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(30, 1, 2, 2, generator=generator)
    y = (x.flatten(1)[:, 0] > 0.5).long()

    def figures(seed: int) -> list[Any]:
        data = quick([Ramp(0), Constant(1), Ramp(3)], x, y, seed=seed)
        return [c["accuracy"] for c in data["cells"]] + [data["headline"]]

    assert figures(0) == figures(0)
    assert figures(0) != figures(1)


def test_an_evaluation_leaves_modes_gradients_and_global_generators_alone() -> None:
    x, y = images([0.1] * 4)
    model = Ramp().train()
    before = torch.get_rng_state()
    quick(model, x, y)
    assert model.training
    assert model.weight.grad is None
    assert model.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def _subject(x: Tensor, y: Tensor) -> Subject:
    members = Independent([Ramp(0), Ramp(1)]).eval()
    return Subject(members, x, y, np.arange(len(x)) * 2, "made up")


def _run(store: Path | None, seed: int = 0, **settings: Any) -> dict[str, Any]:
    x, y = images([0.05, 0.15, 0.25, 0.35])
    report = run_suite(
        _subject(x, y), SUITES["quick"], ThreatConfig(eps=EPS), seed=seed, store=store, **settings
    )
    report.data["provenance"].pop("date")
    return report.data


def test_a_resumed_evaluation_gives_the_same_file(tmp_path: Path) -> None:
    whole = _run(tmp_path / "quick")
    files = sorted((tmp_path / "quick").iterdir())
    for lost in (files[1], files[-1]):
        lost.unlink()
    again = _run(tmp_path / "quick")
    for data in (whole, again):  # two cells were attacked again, at another speed
        for cell in data["cells"]:
            cell.pop("seconds")
    assert again == whole
    assert sorted((tmp_path / "quick").iterdir()) == files


def test_a_finished_evaluation_is_read_not_repeated(tmp_path: Path) -> None:
    whole = _run(tmp_path / "quick")
    said: list[str] = []
    assert _run(tmp_path / "quick", log=said.append) == whole
    assert not said


def test_records_hold_what_every_member_said_to_every_image(tmp_path: Path) -> None:
    data = _run(tmp_path / "quick")
    for cell in data["cells"]:
        stored = np.load(tmp_path / cell["per_image"])
        assert stored["correct"].shape == (2, 4)
        assert stored["index"].tolist() == [0, 2, 4, 6]
        assert stored["correct"].mean() == cell["accuracy"]["expected"]
        assert (stored["linf"] <= EPS + 1e-6).all()
        assert cell["forwards"] >= 1
    back = Cell.read(tmp_path / data["cells"][0]["per_image"])
    assert back is not None
    assert back.correct.dtype == bool
    assert isinstance(back.seconds, float)


@pytest.mark.parametrize("size", [8, 64, 224])
def test_projected_points_of_any_size_are_inside_and_a_breach_is_not(size: int) -> None:
    x = torch.rand(2, 3, size, size, generator=stream(0, "images"))
    threat = Threat(norm=2.0, eps=3.0)
    near = threat.project((x + torch.randn(x.shape, generator=stream(1, "moves"))).clamp(0, 1), x)
    verify_ball(near, x, threat, "projected")
    with pytest.raises(InputError, match="left the ball"):
        verify_ball(near, x, Threat(norm=2.0, eps=3.0 - 1e-4), "a smaller ball")


def test_a_breach_of_the_ball_is_an_error_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images([0.1, 0.2])
    with pytest.raises(InputError, match=r"left the ball: a point has an L-inf distance of 0\.3"):
        verify_ball(x - 0.3, x, Threat(eps=EPS), "greedy")
    with pytest.raises(InputError, match="greedy"):
        verify_ball(x + 5, x, Threat(eps=EPS), "greedy")

    def too_far(
        self: Any, victim: Any, x: Tensor, y: Tensor, threat: Threat, *, rng: Any
    ) -> Tensor:
        return x - 2 * threat.eps

    monkeypatch.setattr(FGSM, "perturb", too_far)
    with pytest.raises(InputError, match="left the ball"):
        Task(
            subject=_subject(x, y), attack=FGSM(), threat=ThreatConfig(eps=EPS), view="averaged",
            seed=0, name="fgsm", met=np.ones(2, dtype=bool),
        ).run()  # fmt: skip


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    cells = [
        {"attack": "pgd", "view": "averaged", "settings": {"steps": 5}},
        {"attack": "arc", "view": "members", "threat": {"eps": 0.3}},
        {"attack": "pgd", "view": "averaged", "settings": {"steps": 6}},
    ]
    path.write_text(json.dumps({"cells": cells}))
    x, y = images([0.1, 0.25, 0.4])
    data = quick(Ramp(), x, y, suite=str(path))
    assert data["suite"] == "mine"
    assert expected(data) == [pytest.approx(2 / 3), pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert len({cell["id"] for cell in data["cells"]}) == 3
    assert "steps=5" in data["cells"][0]["repr"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot read"),
        ('{"cells": [{"attack": "pgd"}]}', "cells.0.view"),
        ('{"cells": [{"attack": "pgd", "view": "sampled"}], "colour": 1}', "colour"),
        (
            '{"cells": [{"attack": "pgd", "view": "sampled", "threat": {"eps": "8/0"}}]}',
            r"cells.0.threat.eps: eps must be a finite number.* got '8/0'$",
        ),
        (
            '{"name": "quick", "cells": [{"attack": "pgd", "view": "sampled"}]}',
            "must have letters, digits, - and _ only",
        ),
    ],
)
def test_a_bad_suite_file_is_refused_by_name(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        suite_named(str(tmp_path / "bad.json"))


def test_a_suite_file_takes_a_threat_as_people_write_it(tmp_path: Path) -> None:
    cell = {"attack": "pgd", "view": "sampled", "threat": {"norm": 2, "eps": "128/255"}}
    (tmp_path / "mine.json").write_text(json.dumps({"cells": [cell]}))
    (found,) = suite_named(str(tmp_path / "mine.json")).cells
    assert found.threat == ThreatConfig(norm="2", eps=128 / 255)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ({"attack": "pgdd", "view": "sampled"}, "did you mean pgd"),
        ({"attack": "pgd", "view": "members"}, "cannot be given"),
        ({"attack": "hinge", "view": "sampled"}, "needs"),
        ({"attack": "pgd", "view": "sampled", "settings": {"step": 3}}, "steps"),
        ({"attack": "pgd", "view": "sampled", "threat": ThreatConfig(eps=8)}, "mean 8/255"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(cell: dict[str, Any], reason: str) -> None:
    x, y = images([0.1, 0.2])
    suite = Suite(name="odd", cells=(CellSpec(**cell),))
    with pytest.raises(ConfigError, match=reason):
        run_suite(_subject(x, y), suite, ThreatConfig(eps=EPS))


def test_what_cannot_be_evaluated_is_refused() -> None:
    x, y = images([0.1, 0.2])
    with pytest.raises(InputError, match="lie in"):
        quick(Ramp(), x + 1, y)
    with pytest.raises(InputError, match="one label per image"):
        quick(Ramp(), x, y[:1])
    with pytest.raises(InputError, match="list of networks"):
        evaluate([], (x, y))
    with pytest.raises(InputError, match="mixture"):
        quick(Ramp(), x, y, mixture=[1.0])
    with pytest.raises(ConfigError, match="did you mean quick"):
        quick(Ramp(), x, y, suite="quik")


def test_every_cell_of_every_suite_can_be_built() -> None:
    for suite in SUITES.values():
        for randomized in (True, False):
            plan = plan_of(suite, ThreatConfig(eps=0.1), randomized)
            assert [planned.spec.attack for planned in plan] == [c.attack for c in suite.cells]
            assert len({planned.identity for planned in plan}) == len(plan)
        # whom it stands beside faces attacks that the ensemble faces, too: else no equal terms
        met = [planned.attack for planned in plan_of(suite, ThreatConfig(eps=0.1), True)]
        assert all(attack_of(spec) in met for spec in suite.baseline_attacks)


def test_the_suites_are_the_promised_ones() -> None:
    assert list(SUITES) == ["quick", "paper", "torchattacks", "aware", "full"]
    paper = {spec.attack for spec in SUITES["paper"].cells}
    assert len(paper) == 14
    assert paper == {spec.attack for spec in SUITES["torchattacks"].cells}
    for name in ("paper", "torchattacks"):
        presets = [spec.settings["preset"] for spec in SUITES[name].cells]
        for spec, preset in zip(SUITES[name].cells, presets, strict=True):
            assert preset in ATTACKS[spec.attack].presets
    assert {spec.threat for spec in SUITES["torchattacks"].cells} == {ThreatConfig(eps=8 / 255)}
    aware = [spec.attack for spec in SUITES["aware"].cells]
    assert aware == ["pgd", "hinge", "meanprob_apgd", "arc", "transfer", "subset", "autoattack"]
    full = SUITES["full"]
    for suite in SUITES.values():
        assert all(spec in full.cells for spec in suite.cells)


def test_a_deterministic_method_is_attacked_by_its_average() -> None:
    x, y = images([0.05, 0.3])
    suite = Suite(name="one", cells=(CellSpec(attack="fgsm", view="protocol"),))
    ensemble = Independent([Ramp(0), Ramp(1)])
    for randomized, view in ((True, "sampled"), (False, "averaged")):
        subject = Subject(ensemble, x, y, np.arange(2), "made up", randomized=randomized)
        data = run_suite(subject, suite, ThreatConfig(eps=EPS)).data
        assert data["cells"][0]["view"] == view
        assert data["headline"]["unaware"] is None  # no aware attack, no headline


class Counted(nn.Module):
    """Right while fewer than three of the pixels are brighter than one half."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.flatten(1) > 0.5).sum(1).float() + x.flatten(1).sum(1) / 1000
        return torch.stack([3 - bright, bright - 3], 1)


@pytest.mark.parametrize("pixels", [1, 3, 5])
def test_onepixel_is_scored_at_the_pixels_that_it_may_change(pixels: int) -> None:
    x, y = torch.zeros(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)
    settings = {"pixels": pixels, "steps": 30, "popsize": 20}
    cells = (CellSpec(attack="onepixel", view="averaged", settings=settings),)
    suite, subject = Suite(name="few", cells=cells), Subject(
        Independent([Counted()]), x, y, np.arange(4), "made up"
    )  # fmt: skip
    (cell,) = run_suite(subject, suite, ThreatConfig(eps=EPS)).data["cells"]
    assert cell["stated"]["limit"] == pixels
    # every point that it finds is within the limit
    assert cell["stated"]["accuracy"] == cell["accuracy"]["expected"]
    assert (cell["accuracy"]["expected"] == 1) == (pixels < 3)


def test_a_norm_that_an_attack_lacks_is_refused_before_the_first_attack() -> None:
    x, y = images([0.1])
    subject = Subject(Independent([Ramp()]), x, y, np.arange(1), "made up")

    @dataclass(frozen=True, kw_only=True)
    class Euclidean(PGD):
        norms: ClassVar[tuple[float, ...]] = (2.0,)

    cells = (
        CellSpec(attack="pgd", view="averaged"),
        CellSpec(attack="mine", view="averaged").with_attack(Euclidean()),
    )
    log: list[str] = []
    with pytest.raises(ConfigError, match="Euclidean attacks within L2, not L-inf"):
        run_suite(subject, Suite(name="two", cells=cells), ThreatConfig(eps=EPS), log=log.append)
    assert log == []


def test_unbounded_attacks_are_scored_at_a_stated_distortion_and_enter_no_headline() -> None:
    x, y = images([0.1, 0.3, 0.5])
    cells = (CellSpec(attack="deepfool", view="averaged"), CellSpec(attack="hinge", view="members"))
    suite = Suite(name="two", cells=cells)
    subject = Subject(Independent([Ramp()]), x, y, np.arange(3), "made up")
    data = run_suite(subject, suite, ThreatConfig(eps=EPS)).data
    free, bounded = data["cells"]
    assert free["accuracy"]["expected"] == 0.0  # it may go as far as it likes
    # one pixel must move 0.1, 0.3 or just beyond 0.5: the limit is 0.5
    assert free["stated"] == {"norm": "l2", "limit": 0.5, "accuracy": pytest.approx(1 / 3)}
    assert "stated" not in bounded
    assert data["headline"]["aware"] == pytest.approx(2 / 3)


def test_the_headline_is_at_the_threat_of_the_aware_attacks() -> None:
    x, y = images([0.1, 0.3, 0.45, 0.5])
    far = ThreatConfig(eps=0.4)
    cells = (
        CellSpec(attack="fgsm", view="averaged"),
        CellSpec(attack="fgsm", view="averaged", threat=far),
        CellSpec(attack="hinge", view="members"),
    )
    subject = Subject(Independent([Ramp()]), x, y, np.arange(4), "made up")
    data = run_suite(subject, Suite(name="two", cells=cells), ThreatConfig(eps=EPS)).data
    assert expected(data) == [0.75, 0.5, 0.75]
    assert data["headline"]["unaware"] == data["headline"]["aware"] == 0.75
    # and so is what stands beside it
    hinge = CellSpec(attack="hinge", view="members", threat=far)
    suite = Suite(
        name="far", cells=(hinge,), baseline_attacks=(CellSpec(attack="hinge", view="members"),)
    )
    found = run_suite(subject, suite, ThreatConfig(eps=EPS)).data["headline"]
    assert found["aware"] == found["best_single_member"] == found["averaged"] == 0.5


def test_an_attacker_may_be_called_aware_who_attacks_the_average() -> None:
    x, y = images([0.1, 0.3])
    cells = (CellSpec(attack="pgd", view="averaged", aware=True),)
    subject = Subject(Independent([Ramp(0), Ramp(1)]), x, y, np.arange(2), "made up")
    data = run_suite(subject, Suite(name="avg", cells=cells), ThreatConfig(eps=EPS)).data
    assert data["cells"][0]["aware"] is True
    assert (data["headline"]["unaware"], data["headline"]["aware"]) == (None, 0.5)


def test_seeds_repeat_the_attack(tmp_path: Path) -> None:
    data = _run(tmp_path / "quick", seeds=3)
    for cell in data["cells"]:
        seeds = cell["seeds"]
        assert len(seeds["expected"]) == 3
        assert seeds["expected"][0] == cell["accuracy"]["expected"]
        assert seeds["mean"] == pytest.approx(np.mean(seeds["expected"]))
    assert len(list((tmp_path / "quick").glob("*.seed2.npz"))) == 4
    assert _run(tmp_path / "quick", seeds=3) == data
    once = _run(None)
    assert [c["accuracy"] for c in once["cells"]] == [c["accuracy"] for c in data["cells"]]

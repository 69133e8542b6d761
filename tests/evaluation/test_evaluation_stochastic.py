"""`evaluate` on networks that draw: recognised, measured by fresh draws, or refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import Tensor, nn

import redefense
from redefense.attacks import ATTACKS
from redefense.config import ThreatConfig
from redefense.ensembles import Ensemble, Independent
from redefense.errors import ConfigError, InputError
from redefense.evaluation.cells import Subject
from redefense.evaluation.report_object import Report
from redefense.evaluation.run import run_suite
from redefense.evaluation.stochastic import measure
from redefense.evaluation.stochastic.cells import DrawnCell, Draws, attack_drawn
from redefense.evaluation.stochastic.measure import run_drawn
from redefense.evaluation.suite import CellSpec, Suite
from redefense.results.draws import pair
from redefense.results.join import join
from redefense.rng import stream
from redefense.stochastic import GaussianNoise, Stochastic

EPS = 0.1


class Plane(nn.Module):
    """Two classes on the sides of a plane through the middle of the box."""

    def __init__(self, sign: float = 1.0, pixel: int = 0) -> None:
        super().__init__()
        self.sign, self.pixel = sign, pixel

    def forward(self, x: Tensor) -> Tensor:
        z = 6 * (self.sign * (x.flatten(1)[:, self.pixel] - 0.5) + 0.09)
        return torch.stack([z, -z], 1)


class Slope(nn.Module):
    """A plane at distance 0.1 from the middle of the box, its normal in the first two pixels."""

    def __init__(self, degrees: float) -> None:
        super().__init__()
        angle = math.radians(degrees)
        self.normal = torch.tensor([math.cos(angle), math.sin(angle)])

    def forward(self, x: Tensor) -> Tensor:
        z = 6 * ((x.flatten(1)[:, :2] - 0.5) @ self.normal + 0.1)
        return torch.stack([z, -z], 1)


class TwoModes(nn.Module):
    """Both err only near one point of the ball, to which neither gradient leads."""

    def __init__(self) -> None:
        super().__init__()
        self.modes = nn.ModuleList([Slope(60.0), Slope(-60.0)])

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.modes[int(torch.rand(()) < 0.5)](x)
        return answer


class OwnGenerator(nn.Module):
    """Adds noise that no seed governs."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, 0] - 0.4 + 0.05 * torch.from_numpy(self.rng.normal(size=len(x)))
        return torch.stack([z, -z], 1).float()


X, Y = torch.rand(96, 1, 2, 2, generator=stream(0, "images")), torch.zeros(96, dtype=torch.long)
X[:, 0, 0] = 0.5  # the pixels that the planes look at
FEW = Draws(score=32, attack=4)
PAIR = Suite(
    name="pair",
    cells=(
        CellSpec(attack="pgd", view="sampled", settings={"steps": 10, "keep_best": False}),
        CellSpec(attack="hinge", view="members"),
    ),
)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 64 draws score an attack: intervals are wider, and hold as well."""
    monkeypatch.setattr(measure, "MOST_DRAWS", 64)


def evaluate(model: Any, x: Tensor = X, **settings: Any) -> Report:
    data = (x, Y[: len(x)])
    settings = {"suite": PAIR, **settings}
    return redefense.evaluate(model, data, threat=redefense.Threat(eps=EPS), **settings)


def subject(network: Ensemble) -> Subject:
    return Subject(network, X, Y, np.arange(len(X)), "planes")


def checks(report: Report) -> dict[str, bool | None]:
    return {check["id"]: check["passed"] for check in report.data["checks"]}


def test_a_network_that_draws_is_recognised_and_told() -> None:
    noisy = GaussianNoise(Plane(), sigma=0.1)
    with pytest.warns(UserWarning, match=r"answers equal images differently.*stochastic='on'"):
        report = evaluate(noisy)
    # asked for, it is no news
    assert evaluate(Stochastic(noisy)).headline == report.headline
    headline = report.headline
    assert headline["exact"] is False
    assert headline["draws"] >= 32
    clean, worst = ndtr(0.9), ndtr(-0.1)
    low, high = report.data["clean"]["interval_draws"]
    assert low <= clean <= high
    for name in ("unaware", "aware"):
        low, high = headline[f"{name}_interval_draws"]
        assert low <= worst <= high
        wide = headline[f"{name}_interval"]
        assert wide[0] <= low
        assert high <= wide[1]
    assert checks(report)["S20"] is checks(report)["D1"] is checks(report)["D2"] is True
    assert checks(report)["S21"] is None
    assert (report.unaware.low, report.unaware.high) == tuple(headline["unaware_interval"])
    assert report.aware.value == headline["aware"]
    assert report.members == ()


def test_off_refuses_and_other_words_are_refused() -> None:
    noisy = GaussianNoise(Plane(), sigma=0.1)
    with pytest.raises(InputError, match="different outputs"):
        evaluate(noisy, stochastic="off")
    with pytest.raises(ConfigError, match="off"):
        evaluate(Stochastic(noisy), stochastic="off")
    with pytest.raises(ConfigError, match="must be auto, on or off, got 'maybe'"):
        evaluate(noisy, stochastic="maybe")


def test_a_deterministic_network_keeps_its_figures() -> None:
    x = X.clone()
    x[:, 0, 0] += 0.12 * torch.rand(96, 2, generator=stream(0, "spread"))
    exact, drawn = evaluate(Plane(), x), evaluate(Plane(), x, stochastic="on")
    assert 0 < exact.headline["aware"] < 1
    for name in ("unaware", "aware"):
        assert drawn.headline[name] == pytest.approx(exact.headline[name])
    assert drawn.data["clean"]["expected"] == exact.data["clean"]["expected"]


def test_two_modes_show_what_knowledge_of_the_draw_is_worth() -> None:
    threat = ThreatConfig(norm="2", eps=0.25)
    modes = TwoModes()
    exact = run_suite(subject(Independent(list(modes.modes))), PAIR, threat).headline
    report = run_drawn(subject(Stochastic(modes, draws=8)), PAIR, threat, draws=FEW)
    assert exact["aware"] == 0
    assert report.headline["aware"] == 0
    low, high = report.headline["unaware_interval"]
    assert low > 0.1
    assert low <= exact["unaware"] <= high
    # a finite ensemble written as one network: a member, then its draw
    written = Stochastic([Slope(60.0), GaussianNoise(Slope(-60.0), sigma=0.0)])
    found = run_drawn(subject(written), PAIR, threat, draws=FEW).headline
    low, high = found["unaware_interval"]
    assert low <= exact["unaware"] <= high
    assert found["aware"] == 0


def test_active_dropout_stays_active() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]]))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), layer)
    with pytest.warns(UserWarning, match="answers equal images differently"):
        report = evaluate(model)
    assert model.training
    # wrong only where all four pixels are dropped: a tie, which counts as class 0
    assert report.data["clean"]["expected"] == 1.0
    with pytest.raises(InputError, match="batch norm in training mode"):
        evaluate(nn.Sequential(nn.BatchNorm2d(1), model).train())


def test_a_generator_of_its_own_is_told_and_its_draws_are_fresh() -> None:
    with pytest.warns(redefense.RedCheckWarning, match="generator of its own"):
        report = evaluate(OwnGenerator(), stochastic="on")
    assert checks(report)["D1"] is False
    low, high = report.headline["aware_interval_draws"]
    assert low <= ndtr(0) <= high
    assert (checks(report)["S07"], checks(report)["S22"], checks(report)["S41"]) == (
        True, True, None,
    )  # fmt: skip


def test_answers_that_depend_on_other_images_are_refused() -> None:
    class Batch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1).mean(1) - x.mean() + 0.1 * torch.randn(len(x))
            return torch.stack([z, -z], 1)

    with pytest.raises(InputError, match="depends on the other images in its batch"):
        evaluate(Batch(), stochastic="on")


def test_an_evaluation_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    threat = ThreatConfig(eps=EPS)
    who = subject(Stochastic(GaussianNoise(Plane(), sigma=0.1)))
    whole = run_drawn(who, PAIR, threat, draws=FEW, seeds=2)
    stored = run_drawn(who, PAIR, threat, draws=FEW, seeds=2, store=tmp_path)
    (tmp_path / "hinge-members-linf-0.1.npz").unlink()
    again = run_drawn(who, PAIR, threat, draws=FEW, seeds=2, store=tmp_path)
    assert whole.headline == stored.headline == again.headline
    assert all(len(cell["seeds"]["expected"]) == 2 for cell in whole.data["cells"])


def test_attacks_as_objects_are_kept_in_the_ball_and_no_headline_is_made_of_them() -> None:
    def far(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (x - 0.3).clamp(0, 1)

    with pytest.warns(redefense.RedCheckWarning, match="left the ball on 96 images"):
        report = evaluate(GaussianNoise(Plane(), sigma=0.1), stochastic="on", suite=[far])
    assert report.headline["aware"] is None
    low, high = report.data["cells"][0]["interval_draws"]
    assert low <= ndtr(-0.1) <= high


@pytest.mark.parametrize("stochastic", ["on", "off"])
def test_points_with_nan_are_refused_and_do_not_count_as_fooling(stochastic: str) -> None:
    def without_values(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return x * math.nan

    with pytest.raises(InputError, match="found the value nan"):
        evaluate(Plane(), X[:8], suite=[without_values], stochastic=stochastic)


def test_full_checks_are_said_not_to_apply() -> None:
    found = checks(evaluate(Plane(), X[:8], stochastic="on", checks="full"))
    exact = checks(evaluate(Plane(), X[:8], stochastic="off", checks="full"))
    further = exact.keys() - checks(evaluate(Plane(), X[:8], stochastic="off")).keys()
    assert {"S23", "S24", "S25", "S26", "S27", "S44"} <= further
    assert {found[name] for name in further} == {None}


def test_a_stated_distortion_scores_draws_as_it_scores_members() -> None:
    x = X[:10].clone()
    x[:, 0, 0] = torch.linspace(0.45, 1.0, 10)[:, None]  # the last is farther than the limit
    found = [
        evaluate(Plane(), x, suite=["deepfool", "hinge"], stochastic=way).data["cells"]
        for way in ("on", "off")
    ]
    (drawn, bounded), (exact, _) = found
    assert 0 < exact["stated"]["accuracy"] < 0.5
    assert drawn["stated"] == exact["stated"]
    assert "stated" not in bounded


def test_plugins_are_named_for_draws_as_for_members() -> None:
    def unmoved(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return x

    redefense.register(attacks={"unmoved": unmoved})
    found = [
        evaluate(Plane(), X[:8], suite=["unmoved"], stochastic=way).data["provenance"]["plugins"]
        for way in ("on", "off")
    ]
    assert list(found[0]) == ["attacks.unmoved"]
    assert found[0] == found[1]


def test_attack_choice_and_score_never_share_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    network, used = Stochastic(GaussianNoise(Plane(), sigma=0.1)), list[int]()
    draw = Stochastic.draw

    def noted(self: Stochastic, seed: int, x: Tensor) -> Tensor:
        used.append(seed)
        return draw(self, seed, x)

    monkeypatch.setattr(Stochastic, "draw", noted)
    attack_drawn(
        subject(network), network, ATTACKS["hinge"](), ThreatConfig(eps=EPS), "members",
        Draws(score=32, attack=4), seed=0, name="one",
    )  # fmt: skip
    scoring = used[-32:]
    assert not set(scoring) & set(used[:-32])
    # four seeds that stay, and fresh ones in the other half of the climb
    assert len(set(used)) > 4 + 32 + 32


def test_attacks_on_many_draws_skip_images_that_every_selection_draw_answers_wrongly() -> None:
    network = Stochastic(GaussianNoise(Plane(), sigma=0.05))
    x = torch.full((20, 1, 4, 4), 0.1)  # six standard deviations behind the plane
    x[10:] = 0.5
    who = Subject(network, x, torch.zeros(20, dtype=torch.long), np.arange(20), "planes")
    near = np.arange(20) >= 10

    def attacked(who: Subject, view: str) -> DrawnCell:
        attack = ATTACKS["hinge" if view == "members" else "pgd"]()
        threat = ThreatConfig(eps=EPS)
        return attack_drawn(who, network, attack, threat, view, Draws(score=32), seed=0, name=view)

    aware, unaware = attacked(who, "members"), attacked(who, "sampled")
    assert np.array_equal(aware.attacked, near)
    assert np.array_equal(aware.linf > 0, near)
    assert unaware.attacked.all()
    assert (unaware.linf > 0).all()
    lost = attacked(replace(who, x=x[:10], y=who.y[:10], index=who.index[:10]), "members")
    assert lost.forwards == Draws(score=32).select
    assert lost.backwards == 0


def test_suites_of_a_network_that_draws_are_joined_over_all_their_attacks(tmp_path: Path) -> None:
    threat = ThreatConfig(norm="2", eps=0.25)
    modes = TwoModes()
    who = subject(Stochastic(modes, draws=8))
    suites = [Suite(name=f"part-{k}", cells=(PAIR.cells[0], cell)) for k, cell in enumerate(
        (CellSpec(attack="meanprob_pgd", view="members", settings={"steps": 3}), PAIR.cells[1])
    )]  # fmt: skip
    reports = [run_drawn(who, suite, threat, draws=FEW) for suite in suites]
    for report in reports:
        report.save(tmp_path / "run")
    (result,) = join([tmp_path / "run"])
    corrects = {
        f"{report.data['suite']} {c['id']}": report.cells[c["id"]].correct
        for key in ("cells", "further_cells")
        for report in reports
        for c in report.data[key]
    }
    unaware = [name for name in corrects if "pgd-sampled" in name]
    together = pair(corrects | {"clean": reports[0].cells["clean"].correct}, unaware, 10)
    lowest = min(report.headline["aware"] for report in reports)
    assert result.aware is not None
    assert result.aware.value == min(together["aware"], lowest)
    if together["aware"] <= lowest:
        assert [result.aware.low, result.aware.high] == together["aware_interval"]
    # draws of another seed are other draws: then the lowest figure is all that can be said
    again = run_drawn(who, suites[0], threat, draws=FEW, seed=1)
    again.save(tmp_path / "mixed")
    reports[1].save(tmp_path / "mixed")
    (mixed,) = join([tmp_path / "mixed"])
    assert mixed.aware is not None
    assert mixed.aware.value == min(again.headline["aware"], reports[1].headline["aware"])
    # a damaged record of the seed is one of another seed
    file = tmp_path / "mixed" / "evaluation" / "part-0.json"
    file.write_text(json.dumps(again.data | {"provenance": {"seed": []}}))
    (damaged,) = join([tmp_path / "mixed"])
    assert damaged.aware == mixed.aware

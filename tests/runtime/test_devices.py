"""Nothing may take the CPU for granted: the same on a device that refuses what a GPU refuses."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import redefense
from far import FAR, Far, far_device
from redefense.attacks import ATTACKS, Attack
from redefense.checks import attacks as attacks_checks
from redefense.checks import draws as draws_checks
from redefense.checks import gradients as gradients_checks
from redefense.checks import victim as victim_checks
from redefense.config import override
from redefense.defences import DEFENCES
from redefense.evaluation.api import evaluate_run
from redefense.evaluation.suite import suite_named
from redefense.models import build
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.runtime import mesh as distributed
from redefense.train import loading
from redefense.train.experiment import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:for .*:UserWarning", "ignore::redefense.RedCheckWarning"
)

NETS = [
    build("mlp", num_classes=10, shape=(1, 8, 8), generator=stream(seed)).eval() for seed in (0, 1)
]
IMAGES = torch.rand(4, 1, 8, 8, generator=stream(2))
LABELS = torch.arange(4)
SHORT = {
    "steps": 3, "restarts": 1, "queries": 20, "searches": 2, "iterations": 2, "inner_steps": 3,
    "popsize": 8, "draws": 2, "num_targets": 2, "competitors": 2,
}  # fmt: skip
FEW = [
    {"attack": "fgsm", "view": "protocol"},
    {"attack": "hinge", "view": "members", "settings": {"steps": 2}},
]


def test_the_far_device_refuses_what_a_gpu_refuses() -> None:
    with far_device():
        x = torch.rand(2, 3).to(FAR)
        assert isinstance(x, Far)
        assert (x @ torch.ones(3, 2, device=FAR)).cpu().shape == (2, 2)
        with pytest.raises(RuntimeError, match="two devices"):
            x @ torch.ones(3, 2)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=stream(0), device=FAR)


def report(networks: list[nn.Module], suite: str, checks: str) -> dict[str, Any]:
    data, threat = (IMAGES, LABELS), redefense.Threat(eps=0.2)
    found = redefense.evaluate(networks, data, suite=suite, threat=threat, checks=checks)
    document: dict[str, Any] = json.loads(found.to_json())
    for cell in document["cells"]:
        del cell["seconds"]
    return document


def short(cell: dict[str, Any]) -> dict[str, Any]:
    """The attack with a few steps, which take the same operations as many."""
    return {**cell, "settings": settings_of(cell["attack"])}


def settings_of(name: str) -> dict[str, int]:
    known = ATTACKS[name].__dataclass_fields__
    return {key: value for key, value in SHORT.items() if key in known}


@pytest.fixture
def short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The S-checks with attacks of a few steps, and few random corners."""
    kinds: dict[str, Callable[..., Attack]] = {**ATTACKS}
    attacks = {name: partial(kind, **settings_of(name)) for name, kind in kinds.items()}
    inner = attacks["apgdt"](loss="targeted_margin")
    attacks["transfer"] = partial(kinds["transfer"], attack=inner)
    for module in (attacks_checks, draws_checks, gradients_checks, victim_checks):
        monkeypatch.setattr(module, "ATTACKS", attacks)
    for title, name in (
        ("MeanProbAPGD", "meanprob_apgd"),
        ("Hinge", "hinge"),
        ("Square", "square"),
    ):
        monkeypatch.setattr(attacks_checks, title, lambda made=attacks[name], **_: made())
    monkeypatch.setattr(attacks_checks, "CORNERS", 30)


@pytest.mark.usefixtures("short_checks")
@pytest.mark.parametrize(("suite", "checks"), [("aware", "full"), ("every", "quick")])
def test_networks_are_measured_where_they_lie(suite: str, checks: str, tmp_path: Path) -> None:
    plan = suite_named("aware").model_dump(mode="json")
    if suite == "every":
        views = {name: "members" if ATTACKS[name].adaptive else "averaged" for name in ATTACKS}
        plan = {"cells": [{"attack": name, "view": view} for name, view in views.items()]}
    plan |= {
        key: [short(cell) for cell in plan.get(key, ())] for key in ("cells", "baseline_attacks")
    }
    plan["name"] = "short"
    file = tmp_path / "short.json"
    file.write_text(json.dumps(plan))
    near = report(NETS, str(file), checks)
    with far_device():
        far = report([copy.deepcopy(net).to(FAR) for net in NETS], str(file), checks)
    assert {k: v for k, v in far.items() if k != "provenance"} == {
        k: v for k, v in near.items() if k != "provenance"
    }
    assert far["provenance"]["machine"] == near["provenance"]["machine"] + ", meta"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device is asked for by name, the far one is taken for one that is there."""
    place: Callable[[str], torch.device] = torch.device
    for module in (distributed, loading):
        monkeypatch.setattr(module, "check_device", place)


@pytest.mark.usefixtures("known", "short_checks")
@pytest.mark.parametrize("name", [*DEFENCES, "ps-red"])
def test_every_method_is_trained_and_evaluated_there(name: str, tmp_path: Path) -> None:
    changes = ["data.images=16", "batch_size=8", "precision=fp32"]
    # of two members of dverge, Adam divides one gradient of rounding alone by its own size
    changes += ["ensemble.num_members=2"] if name != "dverge" else []
    changes += ["defence.refit_images=8"] if name == "barre" else []
    base = recipe(f"digits-{name}")
    changes += ["defence.adversary.steps=2"] if "adversary" in base.defence else []
    run, kind, defence = loading.resolve(override(base, changes))
    # an epoch for each stage
    epochs = 1 if len(defence.stages(kind.num_members, 2)) == 1 else 2
    run = override(run, [f"epochs={epochs}"])
    train(run, tmp_path / "near", quiet=True)
    (tmp_path / "few.json").write_text(json.dumps({"cells": FEW}))
    with far_device():
        ensemble = train(run, tmp_path / "far", quiet=True, device=FAR.type)
        assert {type(parameter.data) for parameter in ensemble.parameters()} == {Far}
        if name in ("adp", "barre", "ps-red"):  # one of each kind: averaged, drawn, written
            suite = str(tmp_path / "few.json")
            evaluate_run(tmp_path / "far", suite=suite, images=2, device=FAR.type)
    near, far = (load_file(tmp_path / n / "final" / "weights.safetensors") for n in ("near", "far"))
    for key, value in near.items():
        torch.testing.assert_close(far[key], value, rtol=0, atol=1e-4)

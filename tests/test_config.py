"""Runs as data: round trips, overrides and one clear line for everything that is wrong."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from redefense.config import choose, override, parse_run, settings_of, to_json
from redefense.defences import DEFENCES
from redefense.defences.red import RED
from redefense.ensembles.configs import ENSEMBLES
from redefense.errors import ConfigError
from redefense.recipes import RECIPES, recipe
from redefense.train.loading import resolve


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_resolves_and_its_record_can_be_trained_again(name: str) -> None:
    run, kind, defence = resolve(recipe(name))
    again, same_kind, same_defence = resolve(parse_run(json.loads(to_json(run))))
    assert again == run
    assert (same_kind, same_defence) == (kind, defence)
    assert run.recipe == name


def test_a_family_shows_every_method_the_same_number_of_images() -> None:
    minis = [recipe(name) for name in RECIPES if name.startswith("cifar10-mini-")]
    seen = {(run.data.images, run.epochs, run.batch_size, run.data.augment) for run in minis}
    assert len(seen) == 1


def test_overrides_reach_every_depth_and_keep_the_rest() -> None:
    run = override(
        recipe("digits-red"),
        ["epochs=3", "optim.lr=0.5", "defence.adversary.steps=2", "data.spec=npz:x=y.npz"],
    )
    assert (run.epochs, run.optim.lr, run.data.spec) == (3, 0.5, "npz:x=y.npz")
    assert run.defence["adversary"] == {**recipe("digits-red").defence["adversary"], "steps": 2}
    assert run.threat == recipe("digits-red").threat


def test_threats_may_be_written_as_people_do_and_are_stored_as_numbers() -> None:
    run = override(
        recipe("digits-red"),
        ["threat.norm=2", "threat.eps=128/255", "defence.adversary.eps=8/255"],
    )
    assert (run.threat.norm, run.threat.eps) == ("2", 128 / 255)
    resolved, _, defence = resolve(run)
    assert isinstance(defence, RED)
    assert defence.adversary.eps == resolved.defence["adversary"]["eps"] == 8 / 255
    assert override(run, ["threat.norm=Linf"]).threat.norm == "inf"
    for name, radii in {
        "dverge": ["eps"],
        "trs": ["first_eps", "last_eps"],
        "adp": ["smallest_eps"],
    }.items():
        settings = {"name": name, **dict.fromkeys(radii, "2/255")}
        assert all(getattr(choose(DEFENCES, settings, "defence"), key) == 2 / 255 for key in radii)


def test_another_defence_brings_its_own_settings() -> None:
    run = override(recipe("digits-red"), ["defence.name=vanilla"])
    assert run.defence == {"name": "vanilla"}
    resolve(run)


def test_another_kind_of_ensemble_keeps_what_all_kinds_share() -> None:
    run = override(recipe("digits-ps-red"), ["ensemble.name=independent"])
    _, kind, _ = resolve(run)
    assert kind.num_members == recipe("digits-ps-red").ensemble["num_members"]


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("epoch=3", "unknown setting 'epoch' (did you mean epochs?)"),
        ("optim.learning=1", "unknown setting 'learning'"),
        ("epochs=three", "valid integer, got 'three'"),
        ("epochs=0", "greater than or equal to 1, got 0"),
        ("epochs=2.5", "valid integer"),
        (f"epochs={'9' * 400}", "less than or equal to 1000000000"),
        ("threat.eps=" + "[" * 100_000, "threat.eps: eps must be a finite number"),
        ("epochs=true", "valid integer"),
        ("optim.milestones=[30,60]", "optim.milestones.0 should be less than 1, got 30"),
        ("optim.lr=fast", "optim.lr should be a valid number, got 'fast'"),
        ("data.spec.path=x", "data.spec is a value"),
        ("epochs", "PATH=VALUE"),
        ("=3", "PATH=VALUE"),
        ("similarity=1", "; if it is the method's own: defence.similarity"),
        ("eps=0.1", "(did you mean defence.adversary.eps or threat.eps or optim.eps?)"),
        ("smoothness=1", "; if it is the method's own: defence.smoothness"),
        ("threat.norm=1", "threat.norm: norm must be 'inf' or '2' (or 'linf', 'l2'), got 1"),
        ("threat.eps=8/0", "threat.eps: eps must be a finite number, or a fraction such as 8/255"),
        ("defence.adversary.eps=8/x", "adversary.eps: eps must be a finite number, or a fraction"),
        ("threat.eps=510/255", "L-inf eps must lie in [0, 1] as pixels do, got 2"),
        ("threat.eps=8", "L-inf eps must lie in [0, 1] as pixels do, got 8 (did you mean 8/255?)"),
        ("defence.adversary.eps=8", "adversary.eps must lie in [0, 1] as pixels do, got 8"),
        ("defence.similarty=3", "unknown setting defence.similarty (did you mean similarity?)"),
        ("defence.similarity=high", "defence.similarity"),
        ("defence.adversary.step=3", "defence.adversary.step (did you mean steps?)"),
        ("defence.adversary=3", "must be a group of settings, got 3"),
        ("defence.preset=best", "preset must be printed, released or calibrated"),
        ("defence.name=rde", "unknown defence 'rde' (did you mean red?)"),
        ("ensemble.num_members=0", "num_members must be at least 1, got 0"),
        ("ensemble.num_members=1000000000000", "num_members must be at most 100000"),
        ("ensemble.name=os.system", "unknown ensemble 'os.system'"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(assignment: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(override(recipe("digits-red"), [assignment]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [[], 3, {"epochs": 1}, {"a": {}}, None])
def test_what_is_not_a_run_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError):
        parse_run(data)


def test_settings_are_the_inverse_of_choosing() -> None:
    mappings: list[Mapping[str, type[Any]]] = [DEFENCES, ENSEMBLES]
    for mapping in mappings:
        for name, cls in mapping.items():
            value = cls()
            assert settings_of(mapping, value)["name"] == name
            assert choose(mapping, settings_of(mapping, value), "thing") == value

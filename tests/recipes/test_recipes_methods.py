"""Every method has its recipes, and each recipe is a run that can start."""

import pytest

from redefense.defences import DEFENCES
from redefense.defences.trs import TRS
from redefense.recipes import RECIPES, recipe
from redefense.recipes.cifar10 import MINI, PUBLISHED
from redefense.train.loading import resolve

FAMILIES = ["digits", "cifar10-mini", "cifar10", "tiny-imagenet"]


@pytest.mark.parametrize("method", list(DEFENCES))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_has_a_recipe_in_every_family(family: str, method: str) -> None:
    run, _, defence = resolve(recipe(f"{family}-{method}"))
    assert type(defence) is DEFENCES[method]
    assert run.recipe == f"{family}-{method}"


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_resolves_into_stages_that_fill_its_epochs(name: str) -> None:
    run, kind, defence = resolve(recipe(name))
    stages = defence.stages(kind.num_members, run.epochs)
    assert sum(stage.epochs for stage in stages) == run.epochs


@pytest.mark.parametrize("method", list(DEFENCES))
def test_mini_recipes_show_every_method_the_same_images_and_members(method: str) -> None:
    run, _, _ = resolve(recipe(f"cifar10-mini-{method}"))
    plain = recipe("cifar10-mini-vanilla")
    assert (run.epochs, run.data, run.batch_size) == (plain.epochs, plain.data, plain.batch_size)
    assert run.optim == plain.optim
    assert run.ensemble["num_members"] == plain.ensemble["num_members"]
    assert run.ensemble["model"] == plain.ensemble["model"]


def test_the_swift_recipe_costs_what_adversarial_training_costs() -> None:
    def passes(name: str) -> int:
        """Forward passes of a member: two a step of the adversary, three to learn."""
        run = recipe(name)
        assert run.data.images is not None
        return run.data.images * run.epochs * (2 * int(run.defence["adversary"]["steps"]) + 3)

    assert passes("swift-cifar10-mini") == pytest.approx(passes("cifar10-mini-at"), rel=0.03)


def test_a_mini_search_has_half_the_steps_and_the_same_way_to_go() -> None:
    mini, search = recipe("cifar10-mini-trs").defence, TRS()
    assert 2 * int(mini["steps"]) == search.steps
    assert mini["steps"] * mini["step_size"] == pytest.approx(search.steps * search.step_size)
    small, large = MINI["steps"], PUBLISHED["steps"]
    assert 2 * small == large
    assert small * MINI["step_size"] == pytest.approx(large * PUBLISHED["step_size"])


def test_published_settings() -> None:
    """Of the authors' code, at our eight members; see the files of the methods."""
    gal, adp, trs = (recipe(f"cifar10-{name}") for name in ("gal", "adp", "trs"))
    for run in (gal, adp, trs):
        optim = run.optim
        assert (optim.name, optim.lr, optim.weight_decay, optim.eps) == ("adam", 1e-3, 1e-4, 1e-7)
    assert gal.ensemble["activation"] == "leaky"
    assert (gal.epochs, adp.epochs, trs.epochs) == (200, 200, 120)
    assert (gal.batch_size, adp.batch_size, trs.batch_size) == (128, 64, 128)
    assert trs.optim.milestones == (1 / 3, 2 / 3)
    dverge, tiny = recipe("cifar10-dverge"), recipe("tiny-imagenet-dverge")
    assert (dverge.epochs, dverge.optim.name, dverge.optim.lr) == (400, "sgd", 0.1)
    assert (dverge.defence["eps"], tiny.defence["eps"]) == (0.05, 0.07)
    for name, size in (("mrboost", 128), ("barre", 256)):
        run = recipe(f"cifar10-{name}")
        assert (run.epochs, run.batch_size, run.optim.weight_decay) == (800, size, 5e-4)
        assert recipe(f"tiny-imagenet-{name}").epochs == 300

"""The recipes that end the list of every data set, alike but for their settings."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from redefense.config import Run

Recipes = dict[str, Callable[[], Run]]


def closing(
    prefix: str,
    make: Callable[..., Run],
    adversary: Mapping[str, Any],
    hyper: Mapping[str, Any],
    **weights: float,
) -> Recipes:
    """Forks, snapshots, and RED and PS-RED in all their versions.

    Args:
        prefix: of their names.
        make: makes a run from the settings of its defence, and of its ensemble if not the usual.
        adversary: of the training.
        hyper: the ensemble of PS-RED.
        weights: of the calibrated version, if not the preset's.
    """
    fork = {"name": "fork", "adversary": adversary}
    red = {"name": "red", "adversary": adversary}
    versions: dict[str, dict[str, Any]] = {
        "": weights,
        "-released": {"preset": "released"},
        "-printed": {"preset": "printed"},
        "-at": {"adversarial_training": True},
    }
    return {
        f"{prefix}-fork": partial(make, fork),
        f"{prefix}-fork-subset": partial(make, {**fork, "apart": "subset"}),
        f"{prefix}-snapshots": partial(make, {"name": "snapshots", "adversary": adversary}),
        **{f"{prefix}-red{v}": partial(make, {**red, **own}) for v, own in versions.items()},
        **{
            f"{prefix}-ps-red{v}": partial(make, {**red, **own}, ensemble=hyper)
            for v, own in versions.items()
        },
    }

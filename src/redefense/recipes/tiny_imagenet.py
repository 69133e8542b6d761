"""TinyImageNet: ResNet-18 in its 64x64 form, M = 3, settings as published for CIFAR-10."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from redefense.config import DataConfig, Run
from redefense.recipes.cifar10 import CIFAR10

NUM_MEMBERS = 3
_OWN: Final[Mapping[str, dict[str, Any]]] = {
    "dverge": {"eps": 0.07},  # the published radius for three members
}


def _from(source: Callable[[], Run]) -> Run:
    run = source()
    name, epochs = run.defence["name"], run.epochs
    if name in ("mrboost", "barre"):  # trained one member after another: equal epochs for each
        epochs = epochs * NUM_MEMBERS // run.ensemble["num_members"]
    changes: dict[str, Any] = {
        "data": DataConfig(spec="tiny-imagenet:tiny-imagenet-200.zip", augment=True),
        "ensemble": {**run.ensemble, "model": "resnet18-64", "num_members": NUM_MEMBERS},
        "defence": {**run.defence, **_OWN.get(name, {})},
        "epochs": epochs,
    }
    return run.model_copy(update=changes)


TINY_IMAGENET: Final[Mapping[str, Callable[[], Run]]] = {
    name.replace("cifar10", "tiny-imagenet"): partial(_from, source)
    for name, source in CIFAR10.items()
}

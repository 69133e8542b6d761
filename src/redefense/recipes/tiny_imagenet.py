"""TinyImageNet: ResNet-18 in its 64x64 form, M = 3, settings as published for CIFAR-10."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from redefense.config import DataConfig, Run
from redefense.recipes.cifar10 import CIFAR10


def _from(source: Callable[[], Run]) -> Run:
    run = source()
    changes: dict[str, Any] = {
        "data": DataConfig(spec="tiny-imagenet:tiny-imagenet-200.zip", augment=True),
        "ensemble": {**run.ensemble, "model": "resnet18-64", "num_members": 3},
    }
    return run.model_copy(update=changes)


TINY_IMAGENET: Final[Mapping[str, Callable[[], Run]]] = {
    name.replace("cifar10", "tiny-imagenet"): partial(_from, source)
    for name, source in CIFAR10.items()
}

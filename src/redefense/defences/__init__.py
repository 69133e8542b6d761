"""Training methods by name, one file each."""

import inspect
from typing import Any, Final

from redefense.defences.adp import ADP
from redefense.defences.at import AdversarialTraining
from redefense.defences.barre import BARRE
from redefense.defences.base import Adversary, Defence, Stage
from redefense.defences.dverge import DVERGE
from redefense.defences.fork import Fork
from redefense.defences.gal import GAL
from redefense.defences.mrboost import MRBoost
from redefense.defences.red import RED
from redefense.defences.snapshots import Snapshots
from redefense.defences.trs import TRS
from redefense.defences.vanilla import Vanilla
from redefense.errors import ConfigError
from redefense.plugins import Registry

__all__ = [
    "ADP", "BARRE", "DEFENCES", "DVERGE", "GAL", "RED", "TRS", "AdversarialTraining", "Adversary",
    "Defence", "Fork", "MRBoost", "Snapshots", "Stage", "Vanilla",
    "draws_member",
]  # fmt: skip


def _defence_class(name: str, value: Any) -> type[Defence]:
    if not (isinstance(value, type) and issubclass(value, Defence)) or inspect.isabstract(value):
        raise ConfigError(
            f"the defence {name} must be a Defence class that implements loss, got {value!r}"
        )
    return value


DEFENCES: Final[Registry[type[Defence]]] = Registry(
    "defences",
    {
        "vanilla": Vanilla,
        "at": AdversarialTraining,
        "gal": GAL,
        "adp": ADP,
        "dverge": DVERGE,
        "trs": TRS,
        "red": RED,
        "mrboost": MRBoost,
        "barre": BARRE,
        "fork": Fork,
        "snapshots": Snapshots,
    },
    _defence_class,
)


def draws_member(name: object) -> bool:
    """Whether the method of that name answers with a member drawn at random, as unknown ones do."""
    defence = DEFENCES.get(str(name))
    return defence is None or defence.randomized

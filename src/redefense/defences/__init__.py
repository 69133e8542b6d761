"""Training methods by name: one file and one line each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from redefense.defences.adp import ADP
from redefense.defences.at import AdversarialTraining
from redefense.defences.barre import BARRE
from redefense.defences.base import Adversary, Defence, Stage
from redefense.defences.dverge import DVERGE
from redefense.defences.gal import GAL
from redefense.defences.mrboost import MRBoost
from redefense.defences.red import RED
from redefense.defences.trs import TRS
from redefense.defences.vanilla import Vanilla

__all__ = [
    "ADP", "BARRE", "DEFENCES", "DVERGE", "GAL", "RED", "TRS", "AdversarialTraining", "Adversary",
    "Defence", "MRBoost", "Stage", "Vanilla",
]  # fmt: skip

DEFENCES: Final[Mapping[str, type[Defence]]] = MappingProxyType(
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
    }
)

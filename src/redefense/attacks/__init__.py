"""Attacks: `ATTACKS[name]()(victim, x, y, threat, rng=rng)`; see `base` for the contract."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from redefense.attacks.adaptive import Hinge, MeanProbPGD, Transfer
from redefense.attacks.base import Attack, as_ensemble, frozen
from redefense.attacks.gradient import FGSM, PGD

__all__ = ["ATTACKS", "Attack", "as_ensemble", "frozen"]

ATTACKS: Final[Mapping[str, type[Attack]]] = MappingProxyType(
    {
        "fgsm": FGSM,
        "pgd": PGD,
        # given all members
        "hinge": Hinge,
        "meanprob_pgd": MeanProbPGD,
        "transfer": Transfer,
    }
)

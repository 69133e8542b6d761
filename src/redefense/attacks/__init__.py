"""Attacks: `ATTACKS[name]()(victim, x, y, threat, rng=rng)`; see `base` for the contract."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from redefense.attacks.adaptive import Hinge, MeanProbPGD, Transfer
from redefense.attacks.apgd import APGD, APGDT
from redefense.attacks.base import Attack, as_ensemble, frozen
from redefense.attacks.diverse import DI2FGSM
from redefense.attacks.gradient import BIM, EOTPGD, FGSM, MIM, PGD

__all__ = ["ATTACKS", "Attack", "as_ensemble", "frozen"]

ATTACKS: Final[Mapping[str, type[Attack]]] = MappingProxyType(
    {
        "fgsm": FGSM,
        "bim": BIM,
        "mim": MIM,
        "pgd": PGD,
        "di2fgsm": DI2FGSM,
        "eotpgd": EOTPGD,
        "apgd": APGD,
        "apgdt": APGDT,
        # given all members
        "hinge": Hinge,
        "meanprob_pgd": MeanProbPGD,
        "transfer": Transfer,
    }
)

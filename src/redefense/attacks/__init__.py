"""Attacks: `PGD(steps=50)(model, x, y, Threat(eps=8 / 255))`; see `base` for the contract."""

from typing import Final

from redefense.attacks.adaptive import Hinge, MeanProbAPGD, MeanProbPGD, Transfer
from redefense.attacks.apgd import APGD, APGDT
from redefense.attacks.arc import ARC
from redefense.attacks.auto import AutoAttack
from redefense.attacks.base import Attack
from redefense.attacks.cw import CW
from redefense.attacks.diverse import DI2FGSM
from redefense.attacks.fab import FAB
from redefense.attacks.foreign import Foreign, attack_class, foreign
from redefense.attacks.gradient import BIM, EOTPGD, FGSM, MIM, PGD
from redefense.attacks.minimal import DeepFool
from redefense.attacks.pixels import OnePixel
from redefense.attacks.pixle import Pixle
from redefense.attacks.sparse import SparseFool
from redefense.attacks.square import Square
from redefense.attacks.subset import Subset
from redefense.plugins import Registry

__all__ = [
    "APGD", "APGDT", "ARC", "ATTACKS", "BIM", "CW", "DI2FGSM", "EOTPGD", "FAB", "FGSM", "MIM",
    "PGD", "Attack", "AutoAttack", "DeepFool", "Foreign", "Hinge", "MeanProbAPGD", "MeanProbPGD",
    "OnePixel", "Pixle", "SparseFool", "Square", "Subset", "Transfer", "foreign",
]  # fmt: skip

ATTACKS: Final[Registry[type[Attack]]] = Registry(
    "attacks",
    {
        "fgsm": FGSM,
        "bim": BIM,
        "mim": MIM,
        "pgd": PGD,
        "di2fgsm": DI2FGSM,
        "eotpgd": EOTPGD,
        "apgd": APGD,
        "apgdt": APGDT,
        "fab": FAB,
        "square": Square,
        "autoattack": AutoAttack,
        # not bounded by the threat
        "cw": CW,
        "deepfool": DeepFool,
        "sparsefool": SparseFool,
        "onepixel": OnePixel,
        "pixle": Pixle,
        # given all members
        "arc": ARC,
        "hinge": Hinge,
        "meanprob_apgd": MeanProbAPGD,
        "meanprob_pgd": MeanProbPGD,
        "subset": Subset,
        "transfer": Transfer,
    },
    attack_class,
)

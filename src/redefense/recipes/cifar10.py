"""CIFAR-10: `mini` (minutes on two cores) and the published settings.

The data's place is given on the command line: `--data cifar10:PATH`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from redefense.config import DataConfig, OptimConfig, Run, ThreatConfig
from redefense.recipes.closing import closing

EPS = 0.03
PUBLISHED: Final = {"eps": EPS, "steps": 10, "step_size": 0.25}
MINI: Final = {"eps": EPS, "steps": 5, "step_size": 0.5}
"""The training adversary of the mini recipes: half of the published steps, twice as long."""


def _mini(defence: Mapping[str, Any], **changes: Any) -> Run:
    """ResNet-8 of width 16, M = 3; the same number of images for every method."""
    base = Run(
        data=DataConfig(spec="cifar10:cifar10", images=20_000, augment=True),
        ensemble={"name": "independent", "model": "resnet8", "num_members": 3},
        defence=dict(defence),
        threat=ThreatConfig(eps=EPS),
        optim=OptimConfig(lr=0.2, weight_decay=5e-4, schedule="one-cycle"),
        epochs=3,
        batch_size=128,
        precision="bf16",
    )
    return base.model_copy(update=changes)


def _full(defence: Mapping[str, Any], **changes: Any) -> Run:
    """ResNet-18, M = 8, 120 epochs: the run documented with the released code."""
    base = Run(
        data=DataConfig(spec="cifar10:cifar10", augment=True),
        ensemble={"name": "independent", "model": "resnet18", "num_members": 8},
        defence=dict(defence),
        threat=ThreatConfig(eps=EPS),
        optim=OptimConfig(
            lr=0.1, weight_decay=1e-4, schedule="steps", milestones=(80 / 120, 110 / 120)
        ),
        epochs=120,
        batch_size=256,
        precision="bf16",
    )
    return base.model_copy(update=changes)


# Published: SGD 0.1, 200 epochs, drops at 100 and 150, batch 128 (methods of DVERGE's code)
_SGD_200: Final = {
    "optim": OptimConfig(lr=0.1, weight_decay=1e-4, schedule="steps", milestones=(0.5, 0.75)),
    "epochs": 200,
    "batch_size": 128,
}
_AT: Final = {"name": "at", "adversary": {"eps": 8 / 255, "steps": 10, "step_size": 0.25}}

# Published for GAL, ADP and TRS: Adam at 1e-3 with L2, one optimizer for all members. Single
# precision, since input gradients are differentiated again.
_ADAM: Final[Mapping[str, Any]] = {
    "optim": OptimConfig(
        name="adam", lr=1e-3, weight_decay=1e-4, eps=1e-7, schedule="steps", milestones=(0.5, 0.75)
    ),
    "epochs": 200,
    "batch_size": 128,
    "precision": "fp32",
}
# its code's adversarial script: 180 epochs, drops after 80, 120 and 160
_ADP_AT_RUN: Final = {
    **_ADAM,
    "optim": _ADAM["optim"].model_copy(update={"milestones": (80 / 180, 120 / 180, 160 / 180)}),
    "epochs": 180,
    "batch_size": 64,
}
_TRS_RUN: Final = {
    **_ADAM,
    "optim": _ADAM["optim"].model_copy(update={"milestones": (1 / 3, 2 / 3)}),
    "epochs": 120,
}
_LEAKY: Final = {
    "name": "independent", "model": "resnet18", "num_members": 8, "activation": "leaky",
}  # fmt: skip
# 200 plain epochs, then 200; 0.05 is the radius for 5 and 8 members
_DVERGE: Final = {"name": "dverge", "eps": 0.05, "step_size": 0.1}
_BOOST: Final = {
    "optim": OptimConfig(lr=0.1, weight_decay=5e-4, schedule="steps", milestones=(0.5, 0.75)),
    "epochs": 800,  # 100 a member
}

_MINI_LEAKY: Final = {
    "name": "independent", "model": "resnet8", "num_members": 3, "activation": "leaky",
}  # fmt: skip
# half of the published search, as the adversaries have half of their ten steps
_MINI_TRS: Final = {
    "name": "trs", "steps": 3, "step_size": 2 / 3,
}  # fmt: skip
# the printed form at the weights of our RED, as on the digits
_MINI_TRS_OURS: Final = {**_MINI_TRS, "preset": "printed", "similarity": 0.1, "smoothness": 0.25}
_MINI_DVERGE: Final = {"name": "dverge", "start": 1 / 3, "steps": 5, "step_size": 0.2}
_MINI_BARRE: Final = {"name": "barre", "adversary": MINI, "refit_images": 256, "refit_steps": 4}

# one network: its draws are of the noise
_MINI_ONE: Final = {"name": "independent", "model": "resnet8", "num_members": 1}
_MINI_IMAGE_NOISE: Final = {**_MINI_ONE, "noise": "image", "sigma": 0.25}
_MINI_LAYER_NOISE: Final = {**_MINI_ONE, "noise": "layers", "sigma": 0.2}

# units as wide as ResNet-8's first stage, embeddings so short that a tenth is stored
_MINI_HYPER: Final = {
    "name": "hyper", "model": "resnet8", "num_members": 3, "unit": 16, "embedding": 16,
    "hidden": 16,
}  # fmt: skip
_HYPER: Final = {
    "name": "hyper", "model": "resnet18", "num_members": 8, "unit": 64, "embedding": 128,
    "hidden": 128,
}  # fmt: skip

CIFAR10_MINI: Final[Mapping[str, Callable[[], Run]]] = {
    "cifar10-mini-vanilla": partial(_mini, {"name": "vanilla"}),
    "cifar10-mini-image-noise": partial(_mini, {"name": "vanilla"}, ensemble=_MINI_IMAGE_NOISE),
    "cifar10-mini-layer-noise": partial(_mini, {"name": "vanilla"}, ensemble=_MINI_LAYER_NOISE),
    "cifar10-mini-at": partial(_mini, {"name": "at", "adversary": MINI}),
    "cifar10-mini-at-joint": partial(_mini, {"name": "at", "variant": "joint", "adversary": MINI}),
    "cifar10-mini-gal": partial(_mini, {"name": "gal"}, ensemble=_MINI_LEAKY),
    "cifar10-mini-adp": partial(_mini, {"name": "adp"}),
    "cifar10-mini-adp-at": partial(
        _mini,
        {
            "name": "adp",
            "adversarial_training": True,
            "adversary": {"eps": 0.05, "steps": 5, "step_size": 0.2},
        },
    ),
    "cifar10-mini-dverge": partial(_mini, _MINI_DVERGE),
    "cifar10-mini-dverge-at": partial(
        _mini, {**_MINI_DVERGE, "adversarial_training": True, "adversary": MINI}
    ),
    "cifar10-mini-trs": partial(_mini, _MINI_TRS_OURS),
    "cifar10-mini-trs-released": partial(_mini, {**_MINI_TRS, "preset": "released"}),
    "cifar10-mini-trs-printed": partial(_mini, {**_MINI_TRS, "preset": "printed"}),
    "cifar10-mini-mrboost": partial(_mini, {"name": "mrboost", "adversary": MINI}),
    "cifar10-mini-barre": partial(_mini, _MINI_BARRE),
    **closing("cifar10-mini", _mini, MINI, _MINI_HYPER),
}

# ours: the arithmetic of cifar10-mini-at; an adversary of one step leaves it 2.7 times the images
CIFAR10_SWIFT: Final[Mapping[str, Callable[[], Run]]] = {
    "swift-cifar10-mini": partial(
        _mini,
        {"name": "at", "adversary": {"eps": EPS, "steps": 1, "step_size": 1.25}},
        data=DataConfig(spec="cifar10:cifar10", images=40_000, augment=True),
        epochs=4,
    ),
}

CIFAR10: Final[Mapping[str, Callable[[], Run]]] = {
    "cifar10-vanilla": partial(_full, {"name": "vanilla"}, **_SGD_200),
    "cifar10-at": partial(_full, _AT, **_SGD_200),
    "cifar10-gal": partial(_full, {"name": "gal"}, **_ADAM, ensemble=_LEAKY),
    "cifar10-adp": partial(_full, {"name": "adp"}, **{**_ADAM, "batch_size": 64}),
    "cifar10-adp-at": partial(_full, {"name": "adp", "adversarial_training": True}, **_ADP_AT_RUN),
    "cifar10-dverge": partial(_full, _DVERGE, **{**_SGD_200, "epochs": 400}),
    "cifar10-dverge-at": partial(
        _full, {**_DVERGE, "adversarial_training": True}, **{**_SGD_200, "epochs": 400}
    ),
    "cifar10-trs": partial(_full, {"name": "trs", "preset": "released"}, **_TRS_RUN),
    "cifar10-trs-printed": partial(_full, {"name": "trs", "preset": "printed"}, **_TRS_RUN),
    "cifar10-mrboost": partial(_full, {"name": "mrboost"}, **_BOOST, batch_size=128),
    "cifar10-barre": partial(_full, {"name": "barre"}, **_BOOST),
    **closing("cifar10", _full, PUBLISHED, _HYPER),
}

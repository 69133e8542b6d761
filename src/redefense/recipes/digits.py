"""The embedded digits, in seconds on a CPU: eps 0.2, where an undefended ensemble falls."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from redefense.config import DataConfig, OptimConfig, Run, ThreatConfig
from redefense.recipes.closing import closing

EPS = 0.2
ADVERSARY: Final = {"eps": EPS, "steps": 10, "step_size": 0.25}


def _run(defence: Mapping[str, Any], **changes: Any) -> Run:
    base = Run(
        data=DataConfig(spec="digits"),
        ensemble={"name": "independent", "model": "digits-cnn", "num_members": 3},
        defence=dict(defence),
        threat=ThreatConfig(eps=EPS),
        optim=OptimConfig(name="adam", lr=3e-3, weight_decay=0.0),
        epochs=30,
        batch_size=64,
    )
    return base.model_copy(update=changes)


_LEAKY: Final = {
    "name": "independent", "model": "digits-cnn", "num_members": 3, "activation": "leaky",
}  # fmt: skip
_DVERGE: Final = {"name": "dverge", "eps": 0.3}
_TRS: Final = {"name": "trs", "first_eps": EPS / 3, "last_eps": EPS}
# the printed form at the weights of our RED, best of three tried on the validation split: its
# smoothness counts gradient norms twice
_TRS_OURS: Final = {**_TRS, "preset": "printed", "similarity": 0.1, "smoothness": 0.25}
_ADP_AT: Final = {
    "name": "adp", "adversarial_training": True, "smallest_eps": EPS / 5,
    "adversary": {"eps": EPS, "steps": 10, "step_size": 0.1},
}  # fmt: skip
_BARRE: Final = {"name": "barre", "adversary": ADVERSARY, "refit_images": 256, "refit_steps": 5}

_HYPER: Final = {
    "name": "hyper", "model": "digits-cnn", "num_members": 3, "unit": 16, "embedding": 8,
    "hidden": 8,
}  # fmt: skip

# one network: its draws are of the noise
_ONE: Final = {"name": "independent", "model": "digits-cnn", "num_members": 1}
_IMAGE_NOISE: Final = {**_ONE, "noise": "image", "sigma": 0.25}
_LAYER_NOISE: Final = {**_ONE, "noise": "layers", "sigma": 0.2}

DIGITS: Final[Mapping[str, Callable[[], Run]]] = {
    "digits-vanilla": partial(_run, {"name": "vanilla"}),
    "digits-image-noise": partial(_run, {"name": "vanilla"}, ensemble=_IMAGE_NOISE),
    "digits-layer-noise": partial(_run, {"name": "vanilla"}, ensemble=_LAYER_NOISE),
    "digits-at": partial(_run, {"name": "at", "adversary": ADVERSARY}),
    "digits-at-joint": partial(_run, {"name": "at", "variant": "joint", "adversary": ADVERSARY}),
    "digits-gal": partial(_run, {"name": "gal"}, ensemble=_LEAKY),
    "digits-adp": partial(_run, {"name": "adp"}),
    "digits-adp-at": partial(_run, _ADP_AT),
    "digits-dverge": partial(_run, _DVERGE),
    "digits-dverge-at": partial(
        _run, {**_DVERGE, "adversarial_training": True, "adversary": ADVERSARY}
    ),
    "digits-trs": partial(_run, _TRS_OURS),
    "digits-trs-released": partial(_run, {**_TRS, "preset": "released"}),
    "digits-trs-printed": partial(_run, {**_TRS, "preset": "printed"}),
    "digits-mrboost": partial(_run, {"name": "mrboost", "adversary": ADVERSARY}),
    "digits-barre": partial(_run, _BARRE),
    **closing("digits", _run, ADVERSARY, _HYPER),
}

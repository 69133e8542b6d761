"""The embedded digits, in seconds on a CPU: eps 0.2, where an undefended ensemble falls."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from redefense.config import DataConfig, OptimConfig, Run, ThreatConfig

EPS = 0.2
ADVERSARY: Final = {"eps": EPS, "steps": 10, "step_size": 0.25}


def _run(defence: Mapping[str, Any], **changes: Any) -> Run:
    base = Run(
        data=DataConfig(spec="digits"),
        ensemble={"name": "independent", "model": "digits-cnn", "num_members": 3},
        defence=dict(defence),
        threat=ThreatConfig(eps=EPS),
        optim=OptimConfig(name="adam", lr=3e-3, weight_decay=0.0),
        epochs=40,
        batch_size=64,
    )
    return base.model_copy(update=changes)


_RED: Final = {"name": "red", "adversary": ADVERSARY, "similarity": 1.0, "lipschitz": 1.0}

_HYPER: Final = {
    "name": "hyper", "model": "digits-cnn", "num_members": 3, "unit": 16, "embedding": 8,
}  # fmt: skip

DIGITS: Final[Mapping[str, Callable[[], Run]]] = {
    "digits-vanilla": partial(_run, {"name": "vanilla"}),
    "digits-at": partial(_run, {"name": "at", "adversary": ADVERSARY}),
    "digits-red": partial(_run, _RED),
    "digits-red-released": partial(
        _run, {"name": "red", "preset": "released", "adversary": ADVERSARY}
    ),
    "digits-red-printed": partial(
        _run, {"name": "red", "preset": "printed", "adversary": ADVERSARY}
    ),
    "digits-red-at": partial(_run, {**_RED, "adversarial_training": True}),
    "digits-ps-red": partial(_run, _RED, ensemble=_HYPER),
}

"""Ensembles of M classifiers, and the views of them that attacks, reports and users query."""

from importlib import import_module
from typing import Any

from redefense.ensembles.base import Ensemble, Origin, channels_last, check_mixture, device_of
from redefense.ensembles.guards import (
    evaluating,
    frozen_statistics,
    frozen_weights,
    kernels_kept,
    modes_kept,
)
from redefense.ensembles.hyper import Hyper
from redefense.ensembles.independent import Independent, as_ensemble
from redefense.ensembles.recorded_passes import recorded
from redefense.ensembles.views import Averaged, MemberOf, Sampled, logits_of_drawn, mean_log_probs

__all__ = [
    "Averaged",
    "Ensemble",
    "Hyper",
    "Independent",
    "MemberOf",
    "Origin",
    "Sampled",
    "as_ensemble",
    "channels_last",
    "check_mixture",
    "device_of",
    "evaluating",
    "frozen_statistics",
    "frozen_weights",
    "kernels_kept",
    "logits_of_drawn",
    "mean_log_probs",
    "modes_kept",
    "recorded",
]


def __getattr__(name: str) -> Any:
    # imported on first use, since it builds on this package
    if name == "configs":
        return import_module("redefense.ensembles.configs")
    raise AttributeError(f"module 'redefense.ensembles' has no attribute {name!r}")

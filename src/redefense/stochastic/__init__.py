"""Stochastic networks as ensembles whose members are seeds."""

from redefense.models.randomized import (
    ActivationPruning,
    GaussianNoise,
    NoiseLayers,
    ResizeAndPad,
    TestTimeDropout,
)
from redefense.stochastic.ensemble import Drawn, Stochastic, Vote, seeds_of

__all__ = [
    "ActivationPruning",
    "Drawn",
    "GaussianNoise",
    "NoiseLayers",
    "ResizeAndPad",
    "Stochastic",
    "TestTimeDropout",
    "Vote",
    "seeds_of",
]

"""Networks that draw random numbers in their forward pass, as ensembles whose members are seeds."""

from redefense.stochastic.ensemble import Drawn, Stochastic, Vote, seeds_of
from redefense.stochastic.wrappers import (
    ActivationPruning,
    GaussianNoise,
    NoiseLayers,
    ResizeAndPad,
    TestTimeDropout,
)

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

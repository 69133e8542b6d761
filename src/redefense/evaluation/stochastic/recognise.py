"""Detects stochastic models before they are attacked, and whether seeds determine their draws.

Models are queried in the modes in which they were given: active dropout is part of the model.
"""

from typing import Literal

from torch import Tensor

from redefense.checks.answers import (
    GROSS,
    REPEATS,
    ROUNDING,
    difference_text,
    differences,
    query_member,
    sample_points,
    state_restored,
)
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError, InputError
from redefense.evaluation.stochastic.batching import check_alone, rows_per_call
from redefense.stochastic.ensemble import Stochastic
from redefense.types import Images

Choice = Literal["auto", "on", "off"]
"""Whether a model is measured by draws: "auto" detects it."""

GIVEN = (
    "the model answers equal images differently ({what}), so it is measured as a stochastic "
    "network: its figures are estimates from fresh draws; if it draws in training mode only, call "
    "its eval() first; pass stochastic='on' to silence this warning, stochastic='off' to refuse "
    "such models"
)


def drawing(ensemble: Ensemble, x: Images) -> str:
    """Describe how a member's output differs for equal queries; empty if no output differs.

    Networks, their modes, buffers and the global generators are restored.
    """
    points = sample_points(x)
    for m in range(ensemble.num_members):
        with state_restored(ensemble):
            try:
                first, *again = (query_member(ensemble, m, points) for _ in range(1 + REPEATS))
            except InputError:
                return ""  # later checks report the error
        if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != len(points):
            return ""
        for other in again:
            if bool((differences(first, other) > ROUNDING).any()):
                return f"member {m}: {difference_text(first, other)}"
    return ""


def as_stochastic(ensemble: Ensemble, x: Images, stochastic: Choice) -> tuple[Ensemble, str]:
    """The unchanged ensemble, or a stochastic network made of it.

    Args:
        ensemble: in the modes in which it was given.
        x: the images.
        stochastic: "auto" detects whether the model draws, "on" assumes that it does, "off" returns
            it unchanged.

    Returns:
        The model to measure, and a warning if "auto" found that it draws, else "".

    Raises:
        ConfigError: if a `Stochastic` is given with "off".
        InputError: as `Stochastic`.
    """
    if isinstance(ensemble, Stochastic):
        if stochastic == "off":
            raise ConfigError(
                "a redefense.Stochastic is measured by draws: stochastic must be 'auto' or 'on', "
                "got 'off'"
            )
        return ensemble, ""
    if stochastic == "off" or (stochastic == "auto" and not (what := drawing(ensemble, x))):
        return ensemble, ""
    # a plain network is the only member of its ensemble
    alone = ensemble.num_members == 1
    network = Stochastic(ensemble.member(0) if alone else ensemble)
    return network, "" if stochastic == "on" else GIVEN.format(what=what)


def check_draws(network: Stochastic, x: Images) -> None:
    """Detect how the network draws, and refuse outputs that depend on other images.

    Sets `network.governed`, `network.placed` and `network.rows`.

    Raises:
        InputError: if the output of an image depends on the rest of its batch, at a fixed seed or
            in distribution.
    """
    points = sample_points(x)
    with state_restored(network):
        check_alone(network, x)
        network.rows = rows_per_call(network, x)
        # three seeds tell: a generator that no seed governs differs at each
        for m in range(min(3, network.num_members)):
            first, again = query_member(network, m, points), query_member(network, m, points)
            if bool((differences(first, again) > ROUNDING).any()):
                network.governed = False
                return
        half = len(points) // 2
        others = points.clone()
        # other images of the same range, far from the first ones
        others[half:] = (points[half:] + 0.37).remainder(1.0)
        shorter = [
            differences(
                query_member(network, m, points)[half:], query_member(network, m, points[half:])
            )
            for m in range(min(3, network.num_members))
        ]
        network.placed = any(bool((difference > ROUNDING).any()) for difference in shorter)
        for m in range(min(3, network.num_members)):
            first, mixed = query_member(network, m, points), query_member(network, m, others)
            if bool((differences(first, mixed)[:half] > GROSS).any()):
                raise InputError(
                    "at a fixed seed the network's output for an image depends on the other images "
                    f"in its batch ({difference_text(first[:half], mixed[:half])}), so no figure "
                    "would hold for single queries: make each output depend on its own image and "
                    "noise only"
                )
    network.governed = True

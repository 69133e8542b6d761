"""Whether a model answers at random, asked before anything is attacked, and what governs its draws.

Asked in the modes in which it was given: dropout in training mode is part of what is measured.
"""

from typing import Final, Literal, cast

from torch import Tensor, nn

from redefense.checks.answers import (
    GROSS,
    REPEATS,
    ROUNDING,
    ask,
    differences,
    kept_as_it_was,
    said,
    sample_points,
)
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError, InputError
from redefense.stochastic.ensemble import Stochastic
from redefense.types import Images

Choice = Literal["auto", "on", "off"]
CHOICES: Final = ("auto", "on", "off")

GIVEN = (
    "the model answers equal images differently ({what}), so it is measured as a stochastic "
    "network: its figures are estimates from fresh draws; stochastic='on' says that this is meant, "
    "stochastic='off' refuses such models"
)


def check_choice(stochastic: str) -> None:
    """Refuse what is no way to treat networks that draw.

    Raises:
        ConfigError: unless it is "auto", "on" or "off".
    """
    if stochastic not in CHOICES:
        raise ConfigError(f"stochastic must be auto, on or off, got {stochastic!r}")


def drawing(ensemble: Ensemble, x: Images) -> str:
    """How equal questions to a member were answered differently, in words; empty if none was.

    Networks, their modes, buffers and the global generators are left as they were.
    """
    points = sample_points(x)
    for m in range(ensemble.num_members):
        with kept_as_it_was(ensemble):
            try:
                first, *again = (ask(ensemble, m, points) for _ in range(1 + REPEATS))
            except InputError:
                return ""  # the checks that follow say what is wrong
        if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != len(points):
            return ""
        for other in again:
            if bool((differences(first, other) > ROUNDING).any()):
                return f"member {m}: {said(first, other)}"
    return ""


def as_stochastic(ensemble: Ensemble, x: Images, stochastic: Choice) -> tuple[Ensemble, str]:
    """The ensemble as it is, or as a stochastic network.

    Args:
        ensemble: as given, in the modes in which it was given.
        x: the images.
        stochastic: "auto" finds out whether it draws, "on" takes it for granted, "off" leaves it.

    Returns:
        What is measured, and, where "auto" found that it draws, the line that says so.

    Raises:
        ConfigError: if a `Stochastic` is given with "off".
        InputError: as `Stochastic`.
    """
    if isinstance(ensemble, Stochastic):
        if stochastic == "off":
            raise ConfigError(
                "a redefense.Stochastic is measured by draws: stochastic='off' cannot be kept"
            )
        return ensemble, ""
    if stochastic == "off" or (stochastic == "auto" and not (what := drawing(ensemble, x))):
        return ensemble, ""
    # a bare network came as the one member of an ensemble
    alone = ensemble.num_members == 1
    network = Stochastic(ensemble.member(0) if alone else ensemble)
    return network, "" if stochastic == "on" else GIVEN.format(what=what)


def check_draws(network: Stochastic, x: Images) -> None:
    """Find out whether seeds govern the draws, and refuse answers that depend on other images.

    Sets `network.governed`.

    Raises:
        InputError: if at one seed an image is answered otherwise in company of other images.
    """
    points = sample_points(x)
    module = cast(nn.Module, network)
    with kept_as_it_was(module):
        for m in range(min(3, network.num_members)):
            first, again = ask(network, m, points), ask(network, m, points)
            if bool((differences(first, again) > ROUNDING).any()):
                network.governed = False
                return
        half = len(points) // 2
        others = points.clone()
        others[half:] = (points[half:] + 0.37).remainder(1.0)
        for m in range(min(3, network.num_members)):
            first, mixed = ask(network, m, points), ask(network, m, others)
            if bool((differences(first, mixed)[:half] > GROSS).any()):
                raise InputError(
                    "at one seed the network answers an image otherwise when other images are in "
                    f"its batch ({said(first[:half], mixed[:half])}), so no figure would hold for "
                    "single queries: let each answer depend on its own image and noise alone"
                )
    network.governed = True

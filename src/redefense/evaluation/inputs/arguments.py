"""The arguments of an evaluation, each one line where it is wrong, before any network is asked."""

import operator
from collections.abc import Sequence
from typing import Any, cast, get_args

from torch import nn

from redefense.config import ThreatConfig
from redefense.ensembles import Ensemble, Independent, as_ensemble
from redefense.errors import ConfigError, InputError
from redefense.evaluation.suite import AttackPrecision
from redefense.networks import FromProbabilities, check_values
from redefense.threat import Threat
from redefense.train.api import TrainedRun


def whole(value: Any, name: str, least: int) -> int:
    """A whole number; numpy's are taken as well, but no fraction and no truth value.

    Raises:
        ConfigError: for anything else, or a number below `least`.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return found


def check_checks(checks: object) -> None:
    """Refuse all but the two extents of the self-checks.

    Raises:
        ConfigError: naming what was given.
    """
    if checks not in ("quick", "full"):
        raise ConfigError(f"checks must be quick or full, got {checks!r}")


def check_precision(precision: object) -> AttackPrecision | None:
    """The arithmetic of attacks, if it is one that is known; None is the suite's choice.

    Raises:
        ConfigError: naming what was given.
    """
    if precision is not None and precision not in get_args(AttackPrecision):
        raise ConfigError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    return cast("AttackPrecision | None", precision)


def read_threat(threat: object) -> ThreatConfig:
    """The configuration of a `Threat`, or of the default one for None.

    Raises:
        ConfigError: for anything else.
    """
    given = Threat() if threat is None else threat
    if not isinstance(given, Threat):
        raise ConfigError(
            f"threat must be a redefense.Threat, such as Threat(norm='linf', eps='8/255'), "
            f"got {threat!r}"
        )
    return ThreatConfig.of(given.norm, given.eps)


def read_ensemble(
    model: Any, mixture: Sequence[float] | None, outputs: object = "logits"
) -> Ensemble:
    """The ensemble that a model, an ensemble or a list of models stands for.

    Args:
        model: as `evaluate` takes it.
        mixture: probabilities of a list of networks.
        outputs: what the networks return.

    Raises:
        InputError: for anything else, and for weights that have no values.
        ConfigError: for a mixture that does not fit.
    """
    if isinstance(model, TrainedRun):
        model = model.ensemble
    ensemble = as_ensemble(model)
    if not isinstance(ensemble, Ensemble):
        raise InputError(f"cannot evaluate a {type(model).__name__}")
    check_values(ensemble)
    if outputs not in ("logits", "probabilities"):
        raise ConfigError(f"outputs must be logits or probabilities, got {outputs!r}")
    if mixture is not None and not isinstance(model, Sequence | nn.ModuleList):
        raise InputError("a mixture goes with a list of networks, one probability each")
    if outputs == "probabilities":
        if type(ensemble) is not Independent:
            raise ConfigError(
                "outputs='probabilities' goes with a network or a list of networks, got a "
                f"{type(ensemble).__name__}"
            )
        ensemble = Independent([FromProbabilities(m) for m in ensemble.members], ensemble.mixture)
    if mixture is None:
        return ensemble
    return Independent(list(cast(Independent, ensemble).members), mixture)

"""Validation of an evaluation's arguments, before any network is called."""

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


def check_checks(checks: object) -> None:
    """Check that `checks` is "quick" or "full".

    Raises:
        ConfigError: for any other value.
    """
    if checks not in ("quick", "full"):
        raise ConfigError(f"checks must be quick or full, got {checks!r}")


def check_precision(precision: object) -> AttackPrecision | None:
    """The precision of attacks, or None for the suite's setting.

    Raises:
        ConfigError: for any other value.
    """
    if precision is not None and precision not in get_args(AttackPrecision):
        raise ConfigError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    return cast("AttackPrecision | None", precision)


def read_threat(threat: object) -> ThreatConfig:
    """The configuration of a `Threat`; for None the default threat.

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
    """The ensemble of a model, an ensemble or a list of models.

    Args:
        model: as in `evaluate`.
        mixture: probabilities of a list of networks.
        outputs: what the networks return.

    Raises:
        InputError: for anything else, and for weights on the meta device.
        ConfigError: for a mixture that does not match the members.
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
        raise InputError("mixture requires a list of networks, with one probability each")
    if outputs == "probabilities":
        if type(ensemble) is not Independent:
            raise ConfigError(
                "outputs='probabilities' requires a network or a list of networks, got a "
                f"{type(ensemble).__name__}"
            )
        ensemble = Independent([FromProbabilities(m) for m in ensemble.members], ensemble.mixture)
    if mixture is None:
        return ensemble
    return Independent(list(cast(Independent, ensemble).members), mixture)

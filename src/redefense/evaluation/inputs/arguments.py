"""Validation of an evaluation's arguments, before any network is called."""

from collections.abc import Sequence
from typing import Any, cast, get_args

from torch import nn

from redefense.config import ThreatConfig
from redefense.ensembles import Ensemble, Independent, as_ensemble
from redefense.errors import ConfigError, InputError
from redefense.evaluation.stochastic.recognise import Choice
from redefense.evaluation.suite import AttackPrecision
from redefense.limits import one_of
from redefense.networks import FromProbabilities, check_values
from redefense.threat import Threat, checked_threat
from redefense.train.api import TrainedRun


def check_choices(*, checks: object, precision: object, stochastic: object) -> None:
    """Check the arguments that are names; `precision` may be None, the suite's setting.

    Raises:
        ConfigError: naming the first that has another value.
    """
    one_of("checks", checks, ("quick", "full"))
    if precision is not None:
        one_of("precision", precision, get_args(AttackPrecision))
    one_of("stochastic", stochastic, get_args(Choice))


def read_threat(threat: object) -> ThreatConfig:
    """The configuration of a `Threat`; for None the default threat.

    Raises:
        ConfigError: for anything else.
    """
    given = Threat() if threat is None else checked_threat(threat)
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
    check_values(ensemble)
    one_of("outputs", outputs, ("logits", "probabilities"))
    # ensembles have a mixture of their own
    if mixture is not None and not isinstance(model, Sequence | nn.ModuleList):
        raise InputError(
            "mixture requires a list of networks, with one probability each, got a "
            f"{type(model).__name__}"
        )
    if outputs == "probabilities":
        # others, as `Hyper`, do not have networks that could be wrapped one by one
        if type(ensemble) is not Independent:
            raise ConfigError(
                "outputs='probabilities' requires a network or a list of networks, got a "
                f"{type(ensemble).__name__}"
            )
        ensemble = Independent([FromProbabilities(m) for m in ensemble.members], ensemble.mixture)
    if mixture is None:
        return ensemble
    return Independent(list(cast(Independent, ensemble).members), mixture)

"""The arguments of an evaluation, each one line where it is wrong, before any network is asked."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from redefense.config import ThreatConfig
from redefense.ensembles import Ensemble, Independent, as_ensemble
from redefense.errors import ConfigError, InputError
from redefense.networks import check_values
from redefense.threat import Threat
from redefense.train.api import TrainedRun
from redefense.types import Images, Labels, check_images, check_labels


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


def read_ensemble(model: Any, mixture: Sequence[float] | None) -> Ensemble:
    """The ensemble that a model, an ensemble or a list of models stands for.

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
    if mixture is None:
        return ensemble
    if isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList):
        raise InputError("a mixture goes with a list of networks, one probability each")
    return Independent(list(model), mixture)


def read_pair(data: Any) -> tuple[Images, Labels]:
    """Images and integer labels (as int64) of a pair, without graphs, fit for gradients.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        got = f"{len(data)} of them" if isinstance(data, tuple | list) else type(data).__name__
        raise InputError(
            f"data must be a specification or a pair (images, labels) of tensors, got {got}"
        )
    check_images(data[0])
    check_labels(data[1], len(data[0]))
    x, y = (
        # tensors of inference mode cannot take part in gradients, and subclasses bring rules of
        # their own
        (part.clone() if part.is_inference() else part).detach().as_subclass(Tensor)
        for part in data
    )
    return x, y.long()

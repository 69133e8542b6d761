"""Ensembles of published weights: the members of a file, as they answer."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redefense.config import construct
from redefense.ensembles import Ensemble, channels_last
from redefense.ensembles.configs import IndependentConfig
from redefense.errors import DataError, first_of
from redefense.models.published import fit, read_states
from redefense.runtime.device import check_device


def from_file(
    path: Path,
    model: str | Mapping[str, Any],
    *,
    num_classes: int,
    shape: tuple[int, int, int],
    device: str,
) -> Ensemble:
    """The networks of a file of weights as an ensemble, in evaluation mode.

    Arguments, warnings and errors are those of `from_pretrained`.
    """
    states = read_states(path)
    settings = {"model": model} if isinstance(model, str) else dict(model)
    kind = construct(IndependentConfig, {**settings, "num_members": len(states)}, "model")
    # every tensor is replaced below, so the seed has no effect
    ensemble = kind.build(num_classes=num_classes, shape=shape, seed=0)
    for m, state in enumerate(states):
        fitted = fit(ensemble.member(m), state)
        if fitted.fresh:
            raise DataError(
                f"{path} does not hold all of a {kind.model} for {num_classes} classes: "
                f"{first_of(fitted.fresh, 5)} of member {m} would stay random, "
                f"{first_of(fitted.unused, 5) or 'nothing'} is left over; train on it with "
                "redefense train --start"
            )
        if fitted.unused:
            # level 3 is the caller of `from_pretrained`
            warnings.warn(
                f"{path} holds more than is used: {first_of(fitted.unused, 5)}", stacklevel=3
            )
    if not fitted.normalised and kind.mean is None:
        warnings.warn(
            f"{path} states no normalisation of images: mean 0.5 and deviation 0.25 are used; if "
            "the weights were trained with others, give model={'model': NAME, 'mean': [...], "
            "'std': [...]}",
            stacklevel=3,
        )
    return channels_last(ensemble).to(check_device(device)).eval()

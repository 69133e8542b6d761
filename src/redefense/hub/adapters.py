"""Ensembles and their views as foolbox, ART and RobustBench expect classifiers."""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from redefense.ensembles import Ensemble, Sampled, device_of, frozen_weights
from redefense.errors import ConfigError, InputError
from redefense.networks import differentiating, query, set_evaluation
from redefense.types import check_images

NOT_ELIGIBLE = (
    "RobustBench admits only classifiers whose forward pass is deterministic, so the sampled "
    "ensemble is not eligible there: pass ensemble.member(i) or ensemble.averaged(), and measure "
    "the sampled one with redefense.evaluate"
)


CALLS = 5  # number of queries by which AutoAttack detects a randomized classifier


def to_foolbox(model: nn.Module, *, device: Any = None) -> Any:
    """A `foolbox.PyTorchModel` with bounds (0, 1).

    An ensemble is used as its sampled view: a member is drawn for every image of every call, so
    wrap it in foolbox's expectation over transformations, or attack `averaged()` or `member(i)`.

    Args:
        model: an ensemble, a view of one, or any network from images in [0, 1] to logits.
        device: foolbox's device; that of the weights by default.

    Raises:
        ConfigError: if foolbox is not installed.
    """
    foolbox = _library("foolbox", "foolbox")
    view = _view(model)
    where = device if device is not None else device_of(view)
    # foolbox warns of models in training mode
    set_evaluation(view)
    return foolbox.PyTorchModel(view, bounds=(0, 1), device=where)


def to_art(model: nn.Module, *, shape: Sequence[int], num_classes: int) -> Any:
    """An `art.estimators.classification.PyTorchClassifier` on numpy arrays in [0, 1].

    An ensemble is used as its sampled view: a member is drawn for every image of every call.

    Args:
        model: an ensemble, a view of one, or any network from images in [0, 1] to logits.
        shape: (channels, H, W) of an image.
        num_classes: number of logits.

    Raises:
        ConfigError: if adversarial-robustness-toolbox is not installed.
    """
    art = _library("art.estimators.classification", "adversarial-robustness-toolbox")
    view = _view(model)
    set_evaluation(view)
    return art.PyTorchClassifier(
        model=view,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(shape),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu" if device_of(view).type == "cpu" else "gpu",
    )


def to_robustbench(model: nn.Module, images: Tensor) -> nn.Module:
    """Check RobustBench's contract and return the model in evaluation mode.

    The contract: images (B, ch, H, W) in [0, 1] to logits (B, C), normalisation inside, a
    deterministic forward pass, gradients that do not vanish. Members and the averaged ensemble
    satisfy it; the sampled ensemble does not.

    Args:
        model: `ensemble.member(i)`, `ensemble.averaged()`, or any network.
        images: (B, ch, H, W), a few images for the check.

    Raises:
        InputError: naming the rule that is broken.
    """
    # by type first: few calls may draw the same member each time
    if isinstance(model, Ensemble) or any(isinstance(part, Sampled) for part in model.modules()):
        raise InputError(NOT_ELIGIBLE)
    check_images(images)
    set_evaluation(model)
    with torch.no_grad():
        answers = [query(model, images) for _ in range(CALLS)]
    logits = answers[0]
    if logits.ndim != 2 or len(logits) != len(images):
        raise InputError(
            f"logits must have shape ({len(images)}, classes), got {tuple(logits.shape)}"
        )
    if not bool(logits.isfinite().all()):
        raise InputError("logits must be finite")
    if not all(torch.allclose(logits, other) for other in answers):
        raise InputError(NOT_ELIGIBLE)
    sums = logits.sum(1)
    if bool(logits.ge(0).all()) and torch.allclose(sums, torch.ones_like(sums)):
        raise InputError("the model answers with probabilities; the contract asks for logits")
    if not _has_gradient(model, images):
        raise InputError("the gradient with respect to an image vanishes")
    return model


def _has_gradient(model: nn.Module, images: Tensor) -> bool:
    """Whether the logits depend on every image."""
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad(), frozen_weights(model):
        # squared, since the plain sum is constant for log-odds and centred logits
        total = query(model, x).square().sum()
        if not total.requires_grad:
            return False
        with differentiating():
            (grads,) = torch.autograd.grad(total, x)
    return bool(grads.flatten(1).abs().amax(1).gt(0).all())


def _view(model: nn.Module) -> nn.Module:
    return model.sampled(per="image") if isinstance(model, Ensemble) else model


def _library(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"{error}: pip install {package}") from None

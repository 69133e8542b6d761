"""Context managers that change modes, weights or statistics of a network and restore them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from redefense.ensembles.hyper import Hyper
from redefense.networks import mode_of, set_evaluation


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; the mode of every submodule is restored on exit."""
    with modes_kept(module):
        set_evaluation(module)
        yield


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """The mode of every submodule is restored on exit."""
    modes = [(child, mode_of(child)) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in modes:
            if training is not None:
                child.training = training


@contextmanager
def kernels_kept(module: nn.Module) -> Iterator[None]:
    """`Hyper.kernels_kept` for every `Hyper` in a module: its weights must not change within."""
    with ExitStack() as stack:
        for child in module.modules():
            if isinstance(child, Hyper):
                stack.enter_context(child.kernels_kept())
        yield


@contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """No gradients of the weights are computed or stored within the block."""
    # weights made in inference mode are never differentiated, and torch cannot restore their flag
    weights = [p for p in module.parameters() if p.requires_grad and not p.is_inference()]
    for p in weights:
        p.requires_grad_(False)
    try:
        with kernels_kept(module):
            yield
    finally:
        for p in weights:
            p.requires_grad_(True)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm in train mode uses batch statistics without updating its running ones."""
    norms = [c for c in module.modules() if isinstance(c, _BatchNorm) and c.track_running_stats]
    for norm in norms:
        # torch then ignores the running statistics in train mode and still uses them in eval mode
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True

"""Training steps without checkpoints or logs, for benchmarks and the cost model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from redefense.config import OptimConfig
from redefense.defences import Stage
from redefense.ensembles import Ensemble
from redefense.rng import draw_seed, stream
from redefense.runtime.mesh import Mesh, Tally
from redefense.runtime.phases import OPTIMIZER, watched
from redefense.train.loop import epoch_number, take_step
from redefense.train.op_counter import OpCounter
from redefense.train.optim import StageOptimizer, learning_rate
from redefense.types import Batch, Progress

Precision = Literal["fp32", "bf16"]


def take_steps(
    ensemble: Ensemble,
    stages: Sequence[Stage],
    batch: Batch,
    *,
    optim: OptimConfig,
    precision: Precision,
    seed: int = 0,
    index: int = 0,
    epoch: int = 0,
    steps: int = 1,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Steps in the middle of the started stage `index`, repeated on one batch.

    The checks of a stage's first step are omitted.
    """
    stage = stages[index]
    optimizer, tally = StageOptimizer(ensemble, stage.members, optim), Tally(Mesh())
    number = epoch_number(stages, index, epoch)
    progress = Progress(epoch, stage.epochs, draw_seed(stream(seed, "epoch", number)))
    for step in range(steps):
        take_step(
            ensemble, stage, replace(batch, progress=progress), optimizer.optimizer,
            optimizer.params, lr=learning_rate(optim, step, steps, stage.schedule),
            clip=optim.clip, precision=precision, total=step, rng=stream(seed, "step", step),
            first=False, tally=tally,
        )  # fmt: skip
        on_step()


def counted_step(
    ensemble: Ensemble,
    stages: Sequence[Stage],
    batch: Batch,
    *,
    optim: OptimConfig,
    precision: Precision,
    seed: int = 0,
    index: int = 0,
    epoch: int = 0,
    dry: bool = True,
) -> OpCounter:
    """Count one step of the training loop; a new optimizer's state is excluded from `live`.

    Gradients of the ensemble are None afterwards.
    """
    counter = OpCounter(dry=dry, staying=frozenset({OPTIMIZER}))
    with gradients_stay(ensemble, counter), counter, watched(counter):
        take_steps(
            ensemble, stages, batch, optim=optim, precision=precision, seed=seed, index=index,
            epoch=epoch,
        )  # fmt: skip
    ensemble.zero_grad(set_to_none=True)
    return counter


@contextmanager
def gradients_stay(ensemble: nn.Module, counter: OpCounter) -> Iterator[None]:
    """Exclude the parameters' gradients from `live`."""

    def stay(parameter: Tensor) -> None:
        if parameter.grad is not None:
            # they stay from step to step, and `Cost` counts them apart from activations
            counter.forget_storage(parameter.grad)

    hooks = [p.register_post_accumulate_grad_hook(stay) for p in ensemble.parameters()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forward_flops(ensemble: Ensemble, x: Tensor) -> int:
    """FLOPs of a forward pass of one member, without generating its weights."""
    # `member` writes its weights before anything is counted
    net, counter = ensemble.member(0).eval(), OpCounter(dry=True)
    with torch.no_grad(), counter:
        net(x)
    return counter.flops()

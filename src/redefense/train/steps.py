"""Training steps without checkpoints or logs, for benchmarks and the cost model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from redefense.config import OptimConfig
from redefense.defences import Stage
from redefense.ensembles import Ensemble
from redefense.runtime.phases import OPTIMIZER, watched
from redefense.train.loop import Loader, Position, fit
from redefense.train.op_counter import OpCounter
from redefense.types import Batch

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class _Same:
    """A loader of one batch, again and again."""

    batch: Batch
    steps: int

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for _ in range(start_step, self.steps):
            yield self.batch


def fit_only(
    ensemble: Ensemble,
    stages: Sequence[Stage],
    loader: Loader,
    *,
    optim: OptimConfig,
    precision: Precision,
    seed: int = 0,
    start: Position | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train through the stages, and save and log nothing."""
    fit(
        ensemble,
        stages,
        loader,
        optim=optim,
        seed=seed,
        precision=precision,
        start=start or Position(),
        start_totals={},
        restore=lambda optimizer: None,
        save=lambda position, optimizer, totals: None,
        on_step=lambda position, terms: on_step(),
        on_epoch=lambda stage, position, means: None,
    )


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
    """Steps of the training loop in the middle of stage `index`, which must have begun.

    The loop's checks of the first step are left out, and nothing is saved or logged.
    """
    # one epoch more, since the loop takes the first step of a stage for its beginning
    last = replace(stages[index], epochs=epoch + 2, before=None, after=None)
    fit_only(
        ensemble, (*stages[:index], last), _Same(batch, steps), optim=optim, precision=precision,
        seed=seed, start=Position(index, epoch + 1), on_step=on_step,
    )  # fmt: skip


def booked_step(
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
    """What the training loop does in one step; a fresh optimizer's state does not count as living.

    The ensemble is left without gradients.
    """
    ledger = OpCounter(dry=dry, staying=frozenset({OPTIMIZER}))
    with gradients_stay(ensemble, ledger), ledger, watched(ledger):
        take_steps(
            ensemble, stages, batch, optim=optim, precision=precision, seed=seed, index=index,
            epoch=epoch,
        )  # fmt: skip
    ensemble.zero_grad(set_to_none=True)
    return ledger


@contextmanager
def gradients_stay(ensemble: nn.Module, ledger: OpCounter) -> Iterator[None]:
    """Parameters' gradients do not count as living."""

    def stay(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ledger.forget_storage(parameter.grad)

    hooks = [p.register_post_accumulate_grad_hook(stay) for p in ensemble.parameters()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forward_flops(ensemble: Ensemble, x: Tensor) -> int:
    """FLOPs of a forward pass of one member, its weights being there."""
    net, ledger = ensemble.member(0).eval(), OpCounter(dry=True)
    with torch.no_grad(), ledger:
        net(x)
    return ledger.flops()

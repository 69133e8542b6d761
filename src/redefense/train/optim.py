"""Optimizers, schedules as functions of the step, and moving averages of weights.

Schedules have no state to resume: the learning rate depends on the step only.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from redefense.config import OptimConfig
from redefense.ensembles import Ensemble
from redefense.train.checkpoint import optimizer_tensors, restore_optimizer

AVERAGE: Final = "average/"
"""Prefix of moving averages among the tensors of a stage's optimizer."""


class StageOptimizer:
    """The optimizer of a stage, and an optional moving average of its parameters.

    Args:
        ensemble: the ensemble, prepared for the stage.
        members: trained members; those of other processes are ignored.
        config: settings of the optimizer.

    Attributes:
        params: the optimized parameters.
    """

    def __init__(self, ensemble: Ensemble, members: Sequence[int], config: OptimConfig) -> None:
        own = [m for m in members if m in ensemble.spread.own(ensemble.num_members)]
        # in order and once each: members may share a hypernetwork
        found = dict.fromkeys(p for m in own for p in ensemble.parameters_of(m))
        self.params = [p for p in found if p.requires_grad]
        self.optimizer = make_optimizer(self.params, config)
        names = {p: name for name, p in ensemble.named_parameters()}
        self._names = {p: names[p] for p in self.params}
        self.average: WeightAverage | None = None
        if config.ema is not None:
            live: dict[str, Tensor] = {name: p for p, name in self._names.items()}
            for m in own:
                live |= {
                    name: buffer
                    for name, buffer in ensemble.named_buffers()
                    # statistics of batch norm, not its counters of batches
                    if name.startswith(f"members.{m}.") and buffer.is_floating_point()
                }
            self.average = WeightAverage(live, config.ema)
            self.optimizer.register_step_post_hook(self.average.update)

    def tensors(self) -> dict[str, Tensor]:
        """The state to be saved: `KEY/PARAMETER` of the optimizer, and the averages."""
        averages = {} if self.average is None else self.average.values
        return optimizer_tensors(self.optimizer, self._names) | {
            AVERAGE + name: value for name, value in averages.items()
        }

    def restore(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Resume from the result of `tensors` after the given number of steps of the stage."""
        own = {name: t for name, t in tensors.items() if not name.startswith(AVERAGE)}
        restore_optimizer(self.optimizer, own, self._names)
        if self.average is not None:
            self.average.updates = updates
            for name, value in self.average.values.items():
                value.copy_(tensors[AVERAGE + name])

    def put_averages(self) -> None:
        """Replace the weights and statistics by their averages, if there are any."""
        if self.average is not None:
            self.average.put()

    @contextmanager
    def averages_in_place(self) -> Iterator[None]:
        """Context in which weights and statistics are replaced by their averages, if any."""
        live = [] if self.average is None else [*self.average.live.values()]
        kept = [value.detach().clone() for value in live]
        self.put_averages()
        try:
            yield
        finally:
            with torch.no_grad():
                for value, own in zip(live, kept, strict=True):
                    value.copy_(own)


class WeightAverage:
    """An exponential moving average of tensors, whose decay grows from 0.1.

    Args:
        live: the tensors, which change in place.
        decay: upper limit; update t = 0, 1, ... uses min(decay, (t + 1) / (t + 10)).

    Attributes:
        values: the averages by name; the tensors themselves before the first update.
        updates: number of updates so far.
    """

    def __init__(self, live: Mapping[str, Tensor], decay: float) -> None:
        self.live, self.decay, self.updates = live, decay, 0
        self.values = {name: value.detach().clone() for name, value in live.items()}

    @torch.no_grad()
    def update(self, *_: Any) -> None:
        """Update the averages; as a hook, after every step of an optimizer."""
        # the warm-up of TensorFlow's ExponentialMovingAverage: first weights are soon forgotten
        decay = min(self.decay, (self.updates + 1) / (self.updates + 10))
        get_ema_multi_avg_fn(decay)([*self.values.values()], [*self.live.values()], 0)
        self.updates += 1

    @torch.no_grad()
    def put(self) -> None:
        """Replace the tensors by their averages."""
        for name, value in self.values.items():
            self.live[name].copy_(value)


def make_optimizer(params: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum or Adam over `params`; the learning rate is set before every step."""
    # fused: one pass over memory, and no copy of all gradients
    fused = {p.device.type for p in params} <= {"cpu", "cuda"}
    groups: list[dict[str, Any]] = [{"params": list(params)}]
    if not config.decay_norms_and_biases:
        # scales of norm layers and biases are the parameters with one axis
        groups = [
            {"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
    lr, decay = config.lr, config.weight_decay
    if config.name == "adam":
        return torch.optim.Adam(groups, lr, eps=config.eps, weight_decay=decay, fused=fused)
    momentum, nesterov = config.momentum, config.nesterov
    return torch.optim.SGD(groups, lr, momentum, weight_decay=decay, nesterov=nesterov, fused=fused)


def learning_rate(
    config: OptimConfig, step: int, num_steps: int, span: tuple[float, float] = (0.0, 1.0)
) -> float:
    """Learning rate of step 0 <= step < num_steps of a stage, which covers `span` of a schedule."""
    # the middle of the step, so that a rate of exactly zero is never used
    done = span[0] + (span[1] - span[0]) * ((step + 0.5) / num_steps)
    match config.schedule:
        case "constant":
            factor = 1.0
        case "cosine":
            factor = (1 + math.cos(math.pi * done)) / 2
        case "steps":
            factor = config.gamma ** sum(done >= milestone for milestone in config.milestones)
        case "one-cycle":
            rise = done / config.warmup if config.warmup else math.inf
            factor = min(rise, (1 - done) / (1 - config.warmup))
    return config.lr * factor

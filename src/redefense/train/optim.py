"""Optimizers and schedules as functions of the step, so that a resume needs no scheduler state."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from redefense.config import OptimConfig


def make_optimizer(params: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum or Adam over `params`; the learning rate is set before every step."""
    # one pass over memory, and no copy of all gradients, which grow with the members
    fused = {p.device.type for p in params} <= {"cpu", "cuda"}
    groups = [{"params": list(params)}]
    if not config.decay_norms_and_biases:
        groups = [
            {"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
    optimizer: torch.optim.Optimizer
    if config.name == "adam":
        optimizer = torch.optim.Adam(
            groups,
            lr=config.lr,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    else:
        optimizer = torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return optimizer


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of step 0 <= step < num_steps of a stage."""
    done = (step + 0.5) / num_steps
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

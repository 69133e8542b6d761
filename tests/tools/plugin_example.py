"""A plug-in as a user writes one: every kind of name that can be registered."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import redefense
from redefense.attacks import PGD, foreign
from redefense.config import DataConfig, Run
from redefense.defences import Defence
from redefense.defences.base import terms
from redefense.ensembles import Ensemble
from redefense.types import Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Smoothed(Defence):
    """Cross-entropy on softened labels."""

    summary: ClassVar[str] = "members trained apart on softened labels"

    smoothing: float = 0.1

    def loss(self, ensemble: Ensemble, batch: Batch, rng: Generator) -> Iterator[Loss]:
        for m in range(ensemble.num_members):
            logits = ensemble.logits_of(m, batch.x)
            ce = F.cross_entropy(logits, batch.y, label_smoothing=self.smoothing)
            yield Loss(ce, terms(ce=ce / ensemble.num_members, total=ce))


def one_step(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """One signed step."""
    x = x.requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return (x + eps * grad.sign()).clamp(0, 1).detach()


def flat(num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A linear network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], num_classes))


def stripes() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Bright rows, even or odd."""
    y = torch.arange(200) % 2
    x = torch.full((200, 1, 8, 8), 0.3)
    x[y == 0, :, ::2] = 0.7
    x[y == 1, :, 1::2] = 0.7
    return (x, y), (x[:40], y[:40])


redefense.register(
    attacks={"one-step": foreign(one_step, norms=(float("inf"),))},
    defences={"smoothed": Smoothed},
    models={"flat": flat},
    datasets={"stripes": stripes},
    suites={"mine": [PGD(steps=3), one_step]},
    recipes={
        "stripes-smoothed": Run(
            data=DataConfig(spec="stripes"),
            ensemble={"name": "independent", "model": "flat", "num_members": 2},
            defence={"name": "smoothed"},
            epochs=2,
            batch_size=32,
        )
    },
)

"""Counts forward and backward passes of one image through one member."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from redefense.ensembles import Ensemble
from redefense.types import Images, Logits


class Meter:
    """Running counts, in single-member passes of single images.

    Args:
        on_forward: called with the number of images of every forward pass.
    """

    def __init__(self, on_forward: Callable[[int], None] | None = None) -> None:
        self.forwards = 0
        self.backwards = 0
        self._on_forward = on_forward

    def forward(self, count: int) -> None:
        """Count the forward pass of `count` images through a member."""
        self.forwards += count
        if self._on_forward is not None:
            self._on_forward(count)


class _CountBackward(torch.autograd.Function):
    """Identity that counts backward passes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, meter: Meter) -> Tensor:
        ctx.meter = meter
        # a view: a Function must not return its own input
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.meter.backwards += len(grads[0])
        return grads[0], None


class Metered(Ensemble):
    """An ensemble that counts passes, including those through its views."""

    def __init__(self, ensemble: Ensemble, meter: Meter) -> None:
        super().__init__(ensemble.num_members, ensemble.mixture)
        self.ensemble, self.meter = ensemble, meter
        self.training = ensemble.training

    def logits_of(self, m: int, x: Images) -> Logits:
        logits = self.ensemble.logits_of(m, x)
        self.meter.forward(len(x))
        if not logits.requires_grad:  # no backward pass can follow
            return logits
        counted: Tensor = _CountBackward.apply(logits, self.meter)  # type: ignore[no-untyped-call]  # untyped in torch
        return counted

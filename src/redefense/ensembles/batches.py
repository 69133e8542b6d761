"""Passes of few images at a time, which bound the memory of large networks."""

import random
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from redefense.networks import mode_of, query
from redefense.rng import generators_kept
from redefense.types import Images, Logits


class InBatches(nn.Module):
    """A network that sees at most `batch_size` images per call.

    Logits and input gradients equal those of one call up to rounding, where the output for an image
    depends on this image alone. The graph of a batch is not kept: the backward pass computes its
    logits again, one batch after the other, and draws the same random numbers.

    Args:
        network: maps images to logits.
        batch_size: largest number of images per call, >= 1.
    """

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.network, self.batch_size = network, batch_size
        self.training = mode_of(network) or False

    def forward(self, x: Images) -> Logits:
        once = partial(
            # early_stop would end a repetition by an exception inside of a network of the user
            checkpoint, partial(query, self.network), use_reentrant=False, early_stop=False,
            context_fn=_contexts,
        )  # fmt: skip
        return torch.cat([cast(Tensor, once(part)) for part in x.split(self.batch_size)])


class _SameDraws(AbstractContextManager[None]):
    """Context in which numpy's and Python's generators start as they were at its creation.

    They are restored on exit. `checkpoint` does the same for torch's.
    """

    def __init__(self) -> None:
        self.state, self.numpy_state = random.getstate(), np.random.get_state()

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(generators_kept())
        random.setstate(self.state)
        np.random.set_state(self.numpy_state)

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a pass and of its repetitions."""
    # built before the first pass, so it holds the states that this pass starts from
    return nullcontext(), _SameDraws()

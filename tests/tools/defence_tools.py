"""Small ensembles and batches in float64, and what a loss does to the members."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.defences import Defence
from redefense.ensembles import Independent
from redefense.models import build
from redefense.rng import stream
from redefense.types import Batch, Loss, Progress

SHAPE = (1, 4, 4)


def ensemble(
    num_members: int, model: str = "mlp", *, classes: int = 10, activation: str = "leaky"
) -> Independent:
    nets = [
        build(
            model, num_classes=classes, shape=SHAPE, width=8, activation=activation,
            generator=stream(0, "member", m),
        ).double()
        for m in range(num_members)
    ]  # fmt: skip
    return Independent(nets)


def identical(num_members: int) -> Independent:
    members = ensemble(num_members)
    for m in range(1, num_members):
        members.member(m).load_state_dict(members.member(0).state_dict())
    return members


def batch(size: int = 6, *, epoch: int = 0, epochs: int = 1, seed: int = 0) -> Batch:
    x = torch.rand(size, *SHAPE, dtype=torch.float64, generator=stream(1, "x"))
    return Batch(x, torch.arange(size) % 10, torch.arange(size), Progress(epoch, epochs, seed))


def gradients_of(members: Independent, backward: Callable[[], None]) -> dict[str, Tensor]:
    """Gradients of all parameters that got one."""
    members.zero_grad(set_to_none=True)
    backward()
    return {n: p.grad.clone() for n, p in members.named_parameters() if p.grad is not None}


def run(parts: Iterator[Loss]) -> dict[str, float]:
    """Backpropagate part by part; the sums of their terms."""
    summed: dict[str, float] = {}
    for part in parts:
        part.total.backward()
        for name, value in part.terms.items():
            summed[name] = summed.get(name, 0.0) + value.item()
    return summed


def engine_gradients(
    members: Independent, defence: Defence, data: Batch
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and logged terms of one step of the training loop."""
    logged: dict[str, float] = {}
    grads = gradients_of(
        members, lambda: logged.update(run(defence.loss(members, data, stream(0))))
    )
    return grads, logged


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def slow_gradients(members: Independent, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """g[m][b], one image at a time, from the loss of that image alone."""
    rows = []
    for m in range(members.num_members):
        row = []
        for b in range(len(x)):
            image = x[b : b + 1].clone().requires_grad_()
            loss = F.cross_entropy(members.logits_of(m, image), y[b : b + 1])
            row.append(torch.autograd.grad(loss, image)[0].flatten())
        rows.append(row)
    return rows

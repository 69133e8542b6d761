"""A RED step with all members in one graph, as the released code organises it, for comparison."""

import copy
import os

import torch
import torch.nn.functional as F
from torch import nn

from redefense.defences.base import Adversary
from redefense.defences.red import RED
from redefense.ensembles import Ensemble
from redefense.rng import stream
from redefense.threat import Threat
from redefense.train.op_counter import OpCounter
from redefense.train.steps import gradients_stay
from redefense.types import Batch, Images, Labels

MARGIN = 0.7
"""Fraction of the free memory that a joint graph may use; the allocator needs the rest."""


def torch_layers(ensemble: Ensemble) -> Ensemble:
    """The same ensemble with torch's layers."""
    # the package's layers have closed-form second derivatives, which the released code has not
    for module in ensemble.modules():
        for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
            if isinstance(module, kind):
                module.__class__ = kind
    return ensemble


def joint_step(
    ensemble: Ensemble,
    red: RED,
    x: Images,
    y: Labels,
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
) -> None:
    """One step organised as in the released code: all members in one graph, single precision."""
    ensemble.train()
    # an odd image belongs to the adversarial half, as in the engine
    half = len(x) // 2
    x_adv = x.clone()
    x_adv[half:] = _pgd(ensemble.averaged(), x[half:], y[half:], red.adversary, rng)
    optimizer.zero_grad(set_to_none=True)
    red.terms(ensemble, x, y, x_adv)["total"].backward()
    optimizer.step()


def _pgd(
    victim: nn.Module, x: Images, y: Labels, adversary: Adversary, rng: torch.Generator
) -> Images:
    """PGD as in the released code: each step computes the images' gradient only."""
    threat = Threat(eps=adversary.eps)
    noise = torch.rand(x.shape, generator=rng).to(x)
    point = threat.project(x + threat.eps * (2 * noise - 1), x)
    for _ in range(adversary.steps):
        point = point.detach().requires_grad_()
        # the averaged ensemble returns log-probabilities
        (grad,) = torch.autograd.grad(F.nll_loss(victim(point), y), point)
        ascent = adversary.step_size * threat.eps * grad.sign()
        point = threat.project(point.detach() + ascent, x)
    return point


def joint_living(ensemble: Ensemble, batch: Batch, steps: int = 1) -> int:
    """Bytes above weights, gradients and optimizer state of a joint step, as `joint_counted`."""
    return joint_counted(ensemble, batch, steps).peak


def joint_counted(ensemble: Ensemble, batch: Batch, steps: int = 1) -> OpCounter:
    """The operations of a joint step, counted without running them.

    The ensemble must be on the CPU; it is not changed.
    """
    theirs, counter = torch_layers(copy.deepcopy(ensemble)), OpCounter(dry=True)
    # without momentum the optimizer has no state, which the figure excludes
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.0)
    red = RED(adversary=Adversary(steps=steps))
    with gradients_stay(theirs, counter), counter:
        joint_step(theirs, red, batch.x, batch.y, optimizer, stream(0, "joint"))
    return counter


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # no such name here
        return None

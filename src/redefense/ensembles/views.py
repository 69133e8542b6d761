"""Views of an ensemble as one network: averaged, or a member drawn at random."""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.ensembles.base import Ensemble
from redefense.limits import one_of
from redefense.networks import mode_of
from redefense.rng import draw_members
from redefense.types import Float, Images, Logits, Per


class MemberOf(nn.Module):
    """Member m of an ensemble as a network, which queries the ensemble."""

    def __init__(self, ensemble: Ensemble, m: int) -> None:
        super().__init__()
        self.ensemble, self.m = ensemble, m
        # the flag alone: `train()` would change the modes of the members
        self.training = ensemble.training

    def forward(self, x: Images) -> Logits:
        return self.ensemble.logits_of(self.m, x)


class Averaged(nn.Module):
    """log sum_m p_m softmax(z_m), by logsumexp: finite and exact for logits of any size."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.training = ensemble.training

    def forward(self, x: Images) -> Logits:
        return mean_log_probs(self.ensemble.member_logits(x), self.ensemble.mixture)


class Sampled(nn.Module):
    """Answers with one member drawn at random per call, or one per image."""

    def __init__(self, ensemble: Ensemble, *, rng: torch.Generator | None, per: Per) -> None:
        super().__init__()
        one_of("per", per, get_args(Per))
        self.ensemble, self.rng, self.per = ensemble, rng, per
        self.training = ensemble.training

    def forward(self, x: Images) -> Logits:
        if self.per == "call":
            m = int(draw_members(self.ensemble.mixture, 1, self.rng))
            return self.ensemble.logits_of(m, x)
        drawn = draw_members(self.ensemble.mixture, len(x), self.rng)
        return logits_of_drawn(self.ensemble, x, drawn)


def logits_of_drawn(
    ensemble: Ensemble, x: Images, drawn: Tensor, *, padded: bool | None = None
) -> Logits:
    """(B, C) logits where member drawn[b] answers image b, at the cost of one member, not of M.

    Args:
        ensemble: whose members answer.
        x: images.
        drawn: (B,) members, on the CPU.
        padded: pad each member's images to one of a few sizes, by repeating the last. Accelerator
            libraries initialise for each new size. The default pads there unless a member is in
            training mode, where images of a batch depend on each other. Logits are equal up to
            rounding, which may depend on the batch size.
    """
    if len(drawn) == 0:
        # for the number of classes, which only a member knows
        return ensemble.logits_of(0, x)
    if padded is None:
        several = x.device.type != "cpu" and len(drawn) > 1
        padded = several and not any(mode_of(part) for part in ensemble.modules())
    groups, logits = [], []
    for m in drawn.unique().tolist():
        rows = (drawn == m).nonzero().flatten()
        size = _next_size(len(rows)) if padded else len(rows)
        filled = torch.cat([rows, rows[-1:].expand(size - len(rows))]).to(x.device)
        groups.append(filled[: len(rows)])
        logits.append(ensemble.logits_of(m, x[filled])[: len(rows)])
    return torch.cat(logits)[torch.cat(groups).argsort()]


def _next_size(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most half as many again."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


def mean_log_probs(logits: Float[Tensor, "M B C"], mixture: Tensor) -> Logits:
    """Log of the mixture-weighted mean of the members' probabilities; usable as logits."""
    # members of probability zero are masked, whatever their logits; selecting the others would
    # synchronise with the device at every step of an attack
    logits = logits.where((mixture > 0)[:, None, None], 0.0)
    # half precision has too few digits for small probabilities
    log_probs = F.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=-1)
    return torch.logsumexp(log_probs + mixture.log().to(log_probs)[:, None, None], dim=0)

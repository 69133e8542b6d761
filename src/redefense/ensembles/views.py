"""Views of an ensemble as one network: averaged, or a member drawn at random."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.ensembles.base import Ensemble
from redefense.errors import ConfigError
from redefense.rng import draw_members
from redefense.types import (
    Float,
    Images,
    Logits,
    Per,
)


class Averaged(nn.Module):
    """log sum_m p_m softmax(z_m), by logsumexp: finite and exact for logits of any size."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x: Images) -> Logits:
        return mean_log_probs(self.ensemble.member_logits(x), self.ensemble.mixture)


class Sampled(nn.Module):
    """Answers with one member drawn at random per call, or one per image."""

    def __init__(self, ensemble: Ensemble, *, rng: torch.Generator | None, per: Per) -> None:
        super().__init__()
        if per not in ("call", "image"):
            raise ConfigError(f'a member is drawn per "call" or per "image", got {per!r}')
        self.ensemble, self.rng, self.per = ensemble, rng, per

    def forward(self, x: Images) -> Logits:
        if self.per == "call":
            m = int(draw_members(self.ensemble.mixture, 1, self.rng))
            return self.ensemble.logits_of(m, x)
        drawn = draw_members(self.ensemble.mixture, len(x), self.rng)
        return logits_of_drawn(self.ensemble, x, drawn)


def logits_of_drawn(ensemble: Ensemble, x: Images, drawn: Tensor) -> Logits:
    """(B, C) logits where member drawn[b] answers image b: the work of one member, not of M."""
    if len(drawn) == 0:
        return ensemble.logits_of(0, x)
    groups = [(drawn == m).nonzero().flatten().to(x.device) for m in drawn.unique().tolist()]
    logits = [
        ensemble.logits_of(m, x[rows])
        for m, rows in zip(drawn.unique().tolist(), groups, strict=True)
    ]
    order = torch.cat(groups)
    return torch.cat(logits)[order.argsort()]


def mean_log_probs(logits: Float[Tensor, "M B C"], mixture: Tensor) -> Logits:
    """Log of the mixture-weighted mean of the members' probabilities; usable as logits."""
    # members that never answer count for nothing, whatever they say; masked, since leaving them out
    # would ask the device who they are, and wait for it, at every step of an attack
    logits = logits.where((mixture > 0)[:, None, None], 0.0)
    log_probs = F.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=-1)
    return torch.logsumexp(log_probs + mixture.log().to(log_probs)[:, None, None], dim=0)

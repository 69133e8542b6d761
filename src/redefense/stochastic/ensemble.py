"""A stochastic network as an ensemble whose members are the network at fixed seeds.

Seeded draws make attacks that query single members applicable. The members are only a sample of
the network's draws, so points found on some seeds must be scored on others.
"""

from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from scipy.special import betainc
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from redefense.ensembles import Ensemble, as_ensemble, device_of
from redefense.errors import InputError
from redefense.limits import one_of, within
from redefense.networks import query
from redefense.rng import draw_members, draw_seed, seeded, stream, system_stream
from redefense.types import Float, Images, Logits, Per, whole

DRAWS = 16
"""Default number of seeds that attacks use."""
BLOCK = 16
"""Largest number of draws computed together, as copies of each image within one call."""


def seeds_of(seed: int, purpose: str, draws: int, chunk: int = 0) -> tuple[int, ...]:
    """Seeds of the draws 0, 1, ..., each from the stream named by (seed, purpose, draw, chunk).

    Seeds of different purposes are equal with probability 2**-63 per pair.
    """
    names = ((seed, "stochastic", purpose, draw, chunk) for draw in range(draws))
    return tuple(draw_seed(stream(*name)) for name in names)


class Drawn(nn.Module):
    """An ensemble as one network: a member drawn anew in each forward pass, for the whole batch.

    The draw uses torch's global generator, so that `torch.manual_seed` determines it.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x: Images) -> Logits:
        m = int(draw_members(self.ensemble.mixture, 1, torch.default_generator))
        return self.ensemble.logits_of(m, x)


class Stochastic(Ensemble):
    """A stochastic network as an ensemble whose members are seeds.

    Member s is the network with the global generators of torch (CPU, and CUDA for a network on
    CUDA), numpy and Python set to seed s during the call and restored after it. The noise of an
    image depends on its position in the batch, so a seed repeats an output only at that position.

    The modes of the network's layers are part of the defence: `train` and `eval` do not change
    them. Dropout in training mode stays active.

    Args:
        model: a network from images in [0, 1] to logits; for an ensemble or a list of networks each
            call draws a member, which may draw further random numbers.
        draws: number of members, i.e. of seeds that attacks use, >= 1.
        seed: the seeds are derived from it.

    Attributes:
        seeds: of the members.
        governed: whether equal seeds give equal outputs; False for a network with a separate
            generator. Set by `evaluate`.
        placed: whether the noise of an image depends on its position in the batch. Set by
            `evaluate`.
        rows: rows of a call that computes several draws, as copies of each image; 0 where each draw
            needs a call of its own. Set by `evaluate`.

    Raises:
        ConfigError: if `draws` is no whole number of at least 1, or `seed` none of at least 0.
        InputError: if `model` is not a network, or has batch norm in training mode, whose output
            depends on the other images in the batch.
    """

    def __init__(
        self, model: nn.Module | Sequence[nn.Module], *, draws: int = DRAWS, seed: int = 0
    ) -> None:
        draws, seed = whole(draws, "draws", 1), whole(seed, "seed", 0)
        super().__init__(draws, None)
        network = as_network(model)
        refuse_batch_statistics(network)
        self.model = network
        self.seed = seed
        self.seeds = seeds_of(seed, "member", draws)
        self.governed, self.placed, self.rows = True, True, 0
        self.mixture = self.mixture.to(device_of(network))

    def at(self, seeds: Sequence[int]) -> "Stochastic":
        """A view of the same network (not copied) with other seeds as members."""
        return self._like(self.model, tuple(seeds))

    def on(self, model: nn.Module) -> "Stochastic":
        """Another network, such as a wrapper of this one's, at the same seeds."""
        return self._like(model, self.seeds)

    def _like(self, model: nn.Module, seeds: tuple[int, ...]) -> "Stochastic":
        other = Stochastic(model, draws=len(seeds), seed=self.seed)
        other.seeds, other.governed = seeds, self.governed
        other.placed, other.rows = self.placed, self.rows
        return other

    def logits_of(self, m: int, x: Images) -> Logits:
        """(B, C) logits at seed m. Inputs are not checked: attacks may step outside the box."""
        return self.draw(self.seeds[m], x)

    def draw(self, seed: int, x: Images) -> Logits:
        """(B, C) logits at any seed."""
        with seeded(seed, x.device):
            return query(self.model, x)

    def draw_copies(
        self, seed: int, xs: Float[Tensor, "K B ch H W"], parts: Sequence[int] | None = None
    ) -> Float[Tensor, "K N C"]:
        """Logits of K draws, draw k for the images xs[k], by calls of at most `rows` rows.

        Each call has the K copies of a few consecutive images, and a seed of its own, derived from
        `seed` and its number. `parts` has the numbers of the calls to make, whose N images are
        answered; default: all.
        """
        count = self.images_per_call(len(xs))
        # flattening copies; without this the copy would lose the faster layout
        last = xs[0].is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        logits = []
        for part in range(-(-xs.shape[1] // count)) if parts is None else parts:
            images = xs[:, part * count : (part + 1) * count]
            flat = images.flatten(0, 1).contiguous(memory_format=layout)
            answer = self.draw(draw_seed(stream(seed, "part", part)), flat)
            logits.append(answer.view(len(xs), -1, answer.shape[1]))
        return torch.cat(logits, 1)

    def images_per_call(self, draws: int) -> int:
        """Number of images in one call of `draw_copies`."""
        return max(1, self.rows // draws)

    def fresh(self, seeds: Sequence[int], x: Images) -> Iterator[Logits]:
        """(B, C) logits of as many draws as seeds, in blocks of copies where `rows` allows it.

        A block is seeded by the first of its seeds.
        """
        if not self.rows:
            yield from (self.draw(seed, x) for seed in seeds)
            return
        for start in range(0, len(seeds), BLOCK):
            block = seeds[start : start + BLOCK]
            yield from self.draw_copies(block[0], x.expand(len(block), *x.shape))

    def sampled(self, *, rng: torch.Generator | None = None, per: Per = "call") -> nn.Module:
        """A view with a fresh seed for each call; with `per="image"` for each image.

        Without `rng` the seeds are drawn from the operating system's entropy.
        """
        one_of("per", per, get_args(Per))
        return FreshDraw(self, rng=rng, per=per)

    def vote(self, *, alpha: float = 0.001) -> "Vote":
        """The majority vote over the members, which abstains if it is not significant."""
        return Vote(self, alpha=alpha)

    def parameters_of(self, m: int) -> list[nn.Parameter]:
        """The network's parameters, which all draws share."""
        return list(self.model.parameters())

    def train_members(self, members: Sequence[int]) -> None:
        """Do nothing: the modes of the network are fixed."""

    def train(self, mode: bool = True) -> "Stochastic":
        """Set the `training` flag of this object; the modes of the network's layers are fixed."""
        self.training = mode
        return self


def as_network(model: nn.Module | Sequence[nn.Module]) -> nn.Module:
    """The stochastic network: the model, that of a `Stochastic`, or a member drawn at each call."""
    if isinstance(model, Stochastic):
        return model.model
    ensemble = as_ensemble(model)  # raises for other types
    if (
        isinstance(model, nn.Module)
        and not isinstance(model, nn.ModuleList)
        and not isinstance(model, Ensemble)
    ):
        return model
    return Drawn(ensemble)


class FreshDraw(nn.Module):
    """A view that answers each call, or each image, with a fresh draw."""

    def __init__(self, ensemble: Stochastic, *, rng: torch.Generator | None, per: Per) -> None:
        super().__init__()
        self.ensemble, self.rng, self.per = ensemble, rng, per

    def forward(self, x: Images) -> Logits:
        # a call may draw once for its whole batch
        parts = x.split(1) if self.per == "image" and len(x) > 1 else (x,)
        rng = system_stream() if self.rng is None else self.rng
        return torch.cat([self.ensemble.draw(draw_seed(rng), part) for part in parts])


class Vote(nn.Module):
    """The prediction of randomized smoothing: the most frequent label (Cohen et al., 2019).

    It abstains unless the two-sided binomial test rejects, at level `alpha`, that the two most
    frequent labels are equally likely. The members of the ensemble are the draws.

    Args:
        alpha: probability that the prediction is not the network's most probable label, in (0, 1).
    """

    def __init__(self, ensemble: Ensemble, *, alpha: float = 0.001) -> None:
        super().__init__()
        within("(0, 1)", alpha=alpha)
        self.ensemble, self.alpha = ensemble, alpha

    def forward(self, x: Images) -> Logits:
        """(B, C) logarithms of the shares of votes; rows of -inf where the vote abstains."""
        logits = self.ensemble.member_logits(x)
        votes = torch.zeros(logits.shape[1:], dtype=torch.float64, device=x.device)
        # draw by draw: `+=` counts an index that occurs twice only once
        for labels in logits.argmax(-1):
            votes[torch.arange(len(x), device=x.device), labels] += 1
        return votes_as_logits(votes, self.alpha).to(logits.dtype)


def votes_as_logits(votes: Float[Tensor, "B C"], alpha: float) -> Logits:
    """Logarithms of the shares of votes; rows of -inf where the vote is not significant."""
    top = votes.topk(2, dim=1).values.cpu().numpy()
    # twice the smaller tail: the two-sided test of equal probabilities
    unclear = 2 * betainc(top[:, 0], top[:, 1] + 1, 0.5) > alpha
    log_shares = (votes / votes.sum(1, keepdim=True)).log()
    return log_shares.masked_fill(torch.from_numpy(unclear).to(votes.device)[:, None], -torch.inf)


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse batch norm that uses statistics of the batch.

    Raises:
        InputError: if a batch norm layer is in training mode.
    """
    if any(isinstance(child, _NormBase) and child.training for child in model.modules()):
        raise InputError(
            "the network was given with batch norm in training mode, whose output depends on the "
            "other images in the batch: call .eval() on it, then .train() only on the layers that "
            "draw at test time, such as dropout"
        )

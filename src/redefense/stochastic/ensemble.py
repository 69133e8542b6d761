"""A network that draws in its forward pass, as an ensemble: each member is the network at a seed.

A draw that is repeated by its seed makes every attack that asks members one by one applicable. It
is no exact account of the network: there are more seeds than anybody can enumerate, so what an
attack found on some seeds is to be scored on others.
"""

from collections.abc import Sequence

import torch
from scipy.special import betainc
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from redefense.ensembles import Ensemble, as_ensemble, device_of
from redefense.errors import ConfigError, InputError
from redefense.networks import ask
from redefense.rng import draw_members, draw_seed, seeded, stream, system_stream
from redefense.types import Float, Images, Logits, Per

DRAWS = 16
"""Seeds that attackers see, unless more or fewer are asked for."""


def seeds_of(seed: int, purpose: str, draws: int, chunk: int = 0) -> tuple[int, ...]:
    """Seeds of the draws 0, 1, ..., each from the stream named by (seed, purpose, draw, chunk).

    Streams of different purposes share no seed but by a chance of 2**-63 for each pair.
    """
    names = ((seed, "stochastic", purpose, draw, chunk) for draw in range(draws))
    return tuple(draw_seed(stream(*name)) for name in names)


class Drawn(nn.Module):
    """An ensemble as one network: a member drawn anew in each forward pass, for the whole batch.

    The draw is made by torch's global generator, so that a seed governs it like any other draw.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x: Images) -> Logits:
        m = int(draw_members(self.ensemble.mixture, 1, torch.default_generator))
        return self.ensemble.logits_of(m, x)


class Stochastic(Ensemble):
    """A network that answers at random, as an ensemble whose members are seeds.

    Member s is the network with the global generators of torch (CPU, and CUDA where the network
    lies there), numpy and Python set to seed s around the call, and restored after it. Which noise
    an image meets depends on its place in the batch; a seed repeats an answer only in that place.

    The modes of the network's layers are part of the defence: they stay as they were given, and
    `train` and `eval` do not change them. So dropout in training mode stays active.

    Args:
        model: a network from images in [0, 1] to logits; of an ensemble or a list of networks each
            call draws a member, then that member draws.
        draws: number of members, that is, of seeds that attackers see, >= 1.
        seed: the seeds are derived from it.

    Attributes:
        seeds: of the members.
        governed: whether an equal seed repeats an answer; False for a network with a generator of
            its own. `evaluate` finds out and sets it.

    Raises:
        ConfigError: for fewer than one draw.
        InputError: if `model` is no network, or has batch norm in training mode, with which an
            answer depends on the other images of its batch.
    """

    def __init__(
        self, model: nn.Module | Sequence[nn.Module], *, draws: int = DRAWS, seed: int = 0
    ) -> None:
        if draws < 1:
            raise ConfigError(f"draws must be at least 1, got {draws}")
        super().__init__(draws, None)
        network = as_network(model)
        refuse_batch_statistics(network)
        self.model = network
        self.seed = seed
        self.seeds = seeds_of(seed, "member", draws)
        self.governed = True
        self.mixture = self.mixture.to(device_of(network))

    def at(self, seeds: Sequence[int]) -> "Stochastic":
        """The same network, not a copy, with other seeds as members."""
        other = Stochastic(self.model, draws=len(seeds), seed=self.seed)
        other.seeds, other.governed = tuple(seeds), self.governed
        return other

    def on(self, model: nn.Module) -> "Stochastic":
        """Another network, that of this one with something around it, at the same seeds."""
        other = Stochastic(model, draws=self.num_members, seed=self.seed)
        other.seeds, other.governed = self.seeds, self.governed
        return other

    def logits_of(self, m: int, x: Images) -> Logits:
        """(B, C) logits at seed m. Checks nothing: inner loops may step outside the box."""
        return self.draw(self.seeds[m], x)

    def draw(self, seed: int, x: Images) -> Logits:
        """(B, C) logits at any seed."""
        with seeded(seed, x.device):
            return ask(self.model, x)

    def member(self, m: int) -> nn.Module:
        """The network at seed m, sharing its weights with the ensemble."""
        return OneMember(self, m)

    def sampled(self, *, rng: torch.Generator | None = None, per: Per = "call") -> nn.Module:
        """A fresh draw each call, from all seeds there are; `per="image"` calls for each image.

        Without `rng` the seeds come from the operating system's entropy.
        """
        if per not in ("call", "image"):
            raise ConfigError(f'a draw is made per "call" or per "image", got {per!r}')
        return FreshDraw(self, rng=rng, per=per)

    def vote(self, *, alpha: float = 0.001) -> "Vote":
        """The majority of the members' labels, abstaining where it is not clear enough."""
        return Vote(self, alpha=alpha)

    def parameters_of(self, m: int) -> list[nn.Parameter]:
        """The network's own: its draws share all weights."""
        return list(self.model.parameters())

    def train_members(self, members: Sequence[int]) -> None:
        """Nothing: the modes of the network stay as they were given."""

    def train(self, mode: bool = True) -> "Stochastic":
        """Sets this object's own flag; the network's layers keep the modes they were given in."""
        self.training = mode
        return self


def as_network(model: nn.Module | Sequence[nn.Module]) -> nn.Module:
    """The network that draws: itself, that of a `Stochastic`, or a member drawn at each call."""
    if isinstance(model, Stochastic):
        return model.model
    ensemble = as_ensemble(model)  # refuses what is neither
    if (
        isinstance(model, nn.Module)
        and not isinstance(model, nn.ModuleList)
        and not isinstance(model, Ensemble)
    ):
        return model
    return Drawn(ensemble)


class OneMember(nn.Module):
    """A member of an ensemble as a network, by asking the ensemble."""

    def __init__(self, ensemble: Ensemble, m: int) -> None:
        super().__init__()
        self.ensemble, self.m = ensemble, m

    def forward(self, x: Images) -> Logits:
        return self.ensemble.logits_of(self.m, x)


class FreshDraw(nn.Module):
    """Answers each call, or each image, with a draw that was never seen before."""

    def __init__(self, ensemble: Stochastic, *, rng: torch.Generator | None, per: Per) -> None:
        super().__init__()
        self.ensemble, self.rng, self.per = ensemble, rng, per

    def forward(self, x: Images) -> Logits:
        parts = x.split(1) if self.per == "image" and len(x) > 1 else (x,)
        rng = system_stream() if self.rng is None else self.rng
        return torch.cat([self.ensemble.draw(draw_seed(rng), part) for part in parts])


class Vote(nn.Module):
    """What randomized smoothing answers: the label that most draws give (Cohen et al., 2019).

    It abstains unless the two-sided binomial test rejects, at level `alpha`, that the two most
    frequent labels are equally likely. The members of the ensemble are the draws.

    Args:
        alpha: probability with which an answer may be wrong about the network's likeliest label,
            in (0, 1).
    """

    def __init__(self, ensemble: Ensemble, *, alpha: float = 0.001) -> None:
        super().__init__()
        if not 0 < alpha < 1:
            raise ConfigError(f"alpha must lie in (0, 1), got {alpha}")
        self.ensemble, self.alpha = ensemble, alpha

    def forward(self, x: Images) -> Logits:
        """(B, C) logarithms of the shares of votes; rows of -inf where the vote abstains."""
        logits = self.ensemble.member_logits(x)
        votes = torch.zeros(logits.shape[1:], dtype=torch.float64, device=x.device)
        for labels in logits.argmax(-1):
            votes[torch.arange(len(x), device=x.device), labels] += 1
        return votes_as_logits(votes, self.alpha).to(logits.dtype)


def votes_as_logits(votes: Float[Tensor, "B C"], alpha: float) -> Logits:
    """Logarithms of the shares of votes; rows of -inf where the vote is not clear at `alpha`."""
    top = votes.topk(2, dim=1).values.cpu().numpy()
    # twice the smaller tail, as the two-sided test of equal chances has it
    unclear = 2 * betainc(top[:, 0], top[:, 1] + 1, 0.5) > alpha
    log_shares = (votes / votes.sum(1, keepdim=True)).log()
    return log_shares.masked_fill(torch.from_numpy(unclear).to(votes.device)[:, None], -torch.inf)


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse batch norm that takes its moments from the batch.

    Raises:
        InputError: naming what to do.
    """
    if any(isinstance(child, _NormBase) and child.training for child in model.modules()):
        raise InputError(
            "the network was given with batch norm in training mode, with which an answer depends "
            "on the other images of its batch: call .eval() on it, then .train() on those layers "
            "only that draw at test time, such as dropout"
        )

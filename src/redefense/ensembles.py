"""Ensembles of M classifiers and the views of them that attacks, reports and users query."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import redefense
from redefense.config import Run
from redefense.errors import ConfigError, InputError
from redefense.models import hyper
from redefense.networks import ask, copied, mode_of, set_evaluation
from redefense.rng import draw_members
from redefense.spread import ALONE, Spread
from redefense.types import (
    Ensemble,
    Float,
    Images,
    Logits,
    Per,
    check_images,
    lacking,
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What an ensemble was built and trained from, so that it can be stored elsewhere.

    Attributes:
        run: the resolved run.
        data: name, classes, shape and checksum of its data.
        path: the folder that it was written to or read from.
    """

    run: Run
    data: Mapping[str, Any]
    path: Path


class Members(nn.Module):
    """What every kind of ensemble shares: the mixture and the views. Subclasses are final.

    Attributes:
        mixture: (M,) float64 probabilities with which members answer.
        origin: of a trained ensemble; None for one put together by hand.
        spread: over which processes its training is spread at the moment.
    """

    mixture: Tensor
    origin: Origin | None = None
    spread: Spread = ALONE
    _shares: list[float] | None = None

    def __init__(self, num_members: int, mixture: Sequence[float] | Tensor | None) -> None:
        super().__init__()
        if num_members < 1:
            raise ConfigError(f"an ensemble needs at least one member, got {num_members}")
        self.num_members = num_members
        self.register_buffer("mixture", check_mixture(mixture, num_members))

    def set_mixture(self, mixture: Sequence[float] | Tensor) -> None:
        """Replace the sampling probabilities, in place."""
        self.mixture.copy_(check_mixture(mixture, self.num_members))

    def shares(self) -> list[float]:
        """The mixture as Python numbers; within `mixture_known` no accelerator is waited for."""
        return self.mixture.tolist() if self._shares is None else self._shares

    @contextmanager
    def mixture_known(self) -> Iterator[None]:
        """Within, `shares` reads nothing: the mixture, read at the beginning, must not change."""
        self._shares = self.shares()
        try:
            yield
        finally:
            self._shares = None

    def logits_of(self, m: int, x: Images) -> Logits:
        """(B, C) logits of member m. Checks nothing: inner loops may step outside the box."""
        return ask(self.member(m), x)

    def member(self, m: int) -> nn.Module:
        """Member m as a plain network."""
        raise TypeError(f"{type(self).__name__} does not say what a member is")

    def member_logits(self, x: Images) -> Float[Tensor, "M B C"]:
        """Logits of all members. Checks nothing."""
        own = self.spread.own(self.num_members)
        copies = self.spread.copies(x, self.num_members)
        logits = [self.logits_of(m, at) for m, at in zip(own, copies, strict=True)]
        return self.spread.members(torch.stack(logits))

    def parameters_of(self, m: int) -> list[nn.Parameter]:
        """What training member m alone would change."""
        return list(self.member(m).parameters())

    def train_members(self, members: Sequence[int]) -> None:
        """Train mode for these members, evaluation mode for all others."""
        for m in range(self.num_members):
            self.member(m).train(m in members)

    def averaged(self) -> nn.Module:
        """The deterministic ensemble: log of the mixture-weighted mean probability."""
        return Averaged(self)

    def sampled(self, *, rng: torch.Generator | None = None, per: Per = "call") -> nn.Module:
        """Random sampling inference: a fresh member per forward call, or per image.

        Without `rng` members are drawn from the operating system's entropy.
        """
        return Sampled(self, rng=rng, per=per)

    def save_pretrained(self, folder: str | Path, **settings: Any) -> Path:
        """Write this ensemble as model hubs keep them; see `redefense.save_pretrained`."""
        # what lies above is reached through the public names, when it is asked for
        return redefense.save_pretrained(self, folder, **settings)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Save this ensemble and upload it; see `redefense.push_to_hub`."""
        return redefense.push_to_hub(self, repo_id, **settings)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **settings: Any) -> "Members":
        """An ensemble of this kind as model hubs keep them; see `redefense.from_pretrained`.

        Raises:
            InputError: if it is of another kind.
        """
        found = redefense.from_pretrained(name_or_folder, **settings)
        if not isinstance(found, cls):
            raise InputError(
                f"{name_or_folder} holds an ensemble of the kind {type(found).__name__}, "
                f"not {cls.__name__}"
            )
        return found

    def forward(self, x: Tensor) -> Logits:
        """(B, C) logits, each image answered by a member of its own, drawn in secret.

        Raises:
            InputError: unless x is (B, ch, H, W), floating point, finite and in [0, 1], and of a
                shape that members take: that of the training images, if they were trained here.
        """
        check_images(x)
        trained = None if self.origin is None else tuple(self.origin.data["shape"])
        if trained is not None and x.shape[1:] != trained:
            raise InputError(f"images must be {trained} as in training, got {tuple(x.shape[1:])}")
        return cast(Tensor, self.sampled(per="image")(x))


class Independent(Members):
    """M separate networks.

    Args:
        members: networks from images in [0, 1] to logits; may differ in architecture.
        mixture: M probabilities, uniform unless given.
    """

    def __init__(
        self, members: Sequence[nn.Module], mixture: Sequence[float] | Tensor | None = None
    ) -> None:
        is_list = isinstance(members, Sequence | nn.ModuleList)
        if not is_list or not all(isinstance(m, nn.Module) for m in members):
            raise _no_networks(members)
        super().__init__(len(members), mixture)
        self.members = nn.ModuleList(members)
        self.mixture = self.mixture.to(device_of(self.members))

    def member(self, m: int) -> nn.Module:
        """Member m itself, sharing its weights with the ensemble."""
        return self.members[m]


class Hyper(Members):
    """PS-RED: M networks whose convolutions, but the first, are written by hypernetworks.

    Parameters, and what is saved, are stem, batch norm, classifier, embeddings and hypernetworks.
    Every forward pass writes the kernels of the member that it asks, so they follow any optimizer
    and any edit. Where weights stay as they are for a while (a training step up to the optimizer's,
    an attack, many answers in a row), `kernels_kept` writes them once.

    Args:
        members: plain networks of any architecture of convolutions; their kernels are given up.
        mixture: M probabilities, uniform unless given.
        unit: channels of a unit, 16, 32 or 64; must divide those of all written kernels.
        embedding: numbers from which a unit is written.
        hidden: d, width of the hypernetworks between their two layers, per channel of a unit.
        taps: how nine taps become a 1x1 kernel: "mean", "max" or "sum".
        shared: one hypernetwork for all members in place of one each. Members that are trained one
            after another then change those before them.
        rng: embeddings and hypernetworks are drawn from it.

    Attributes:
        grids: the written kernels of each member.

    Raises:
        ConfigError: if units cannot tile a kernel, or an option does not exist.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        mixture: Sequence[float] | Tensor | None = None,
        *,
        unit: int = 64,
        embedding: int = 128,
        hidden: int = 128,
        taps: str = "mean",
        shared: bool = False,
        rng: torch.Generator,
    ) -> None:
        super().__init__(len(members), mixture)
        if taps not in hyper.TAPS:
            raise ConfigError(f"taps must be one of {', '.join(hyper.TAPS)}, got {taps!r}")
        if min(embedding, hidden) < 1:
            raise ConfigError(
                f"embedding and hidden must be at least 1, got {embedding} and {hidden}"
            )
        self.unit, self.taps, self.shared = unit, taps, shared
        self.grids = [hyper.grids_of(net, unit) for net in members]
        for net, grids in zip(members, self.grids, strict=True):
            hyper.strip(net, grids)
        self.members = nn.ModuleList(members)
        writers = range(1 if shared else len(members))
        self.writers = nn.ModuleList(
            [hyper.Hypernetwork(unit, embedding, hidden, rng) for _ in writers]
        )
        self.embeddings = nn.ParameterList(
            [
                nn.Parameter(hyper.embeddings(sum(g.num_units for g in grids), embedding, rng))
                for grids in self.grids
            ]
        )
        self._kept: dict[int, hyper.Written] | None = None

    def logits_of(self, m: int, x: Images) -> Logits:
        """(B, C) logits of member m. Checks nothing: inner loops may step outside the box."""
        grids, sources = self.grids[m], self._sources(m)
        written = self._written(m)
        kernels = written.kernels
        if torch.is_grad_enabled() and any(s.requires_grad for s in sources):
            kernels = hyper.linked(written, grids, self.taps, sources)
        with hyper.wearing(self.members[m], grids, kernels) as net:
            return cast(Tensor, net(x))

    @contextmanager
    def kernels_kept(self) -> Iterator[None]:
        """Within, each member's kernels are written once, when they are first needed.

        In training all passes of a member up to its backward pass then share one graph through its
        hypernetwork. The weights must not change meanwhile. Blocks may be nested.
        """
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def member(self, m: int) -> nn.Module:
        """Member m written out: a plain network of its own, a copy as of now.

        Train the ensemble through `logits_of`; what is done to this copy does not reach it.
        """
        net = copied(self.members[m])
        hyper.own(net, self.grids[m], self._written(m).kernels)
        return net

    def parameters_of(self, m: int) -> list[nn.Parameter]:
        """Stored parameters of member m, its hypernetwork's included (shared or not)."""
        sources = cast(tuple[nn.Parameter, ...], self._sources(m))
        return [*self.members[m].parameters(), *sources]

    def train_members(self, members: Sequence[int]) -> None:
        """Train mode for these members, evaluation mode for all others."""
        for m, net in enumerate(self.members):
            net.train(m in members)

    def _sources(self, m: int) -> tuple[Tensor, ...]:
        """What the kernels of member m are written from."""
        writer = cast(hyper.Hypernetwork, self.writers[0 if self.shared else m])
        return (self.embeddings[m], *writer.sources())

    def _written(self, m: int) -> hyper.Written:
        """The kernels of member m: those kept, or written now."""
        kept = {} if self._kept is None else self._kept
        if m not in kept:
            # neither a graph nor inference tensors, which training could not use later
            with torch.inference_mode(False), torch.no_grad():
                kept[m] = hyper.Written(hyper.write(self.grids[m], self.taps, self._sources(m)))
        return kept[m]

    def _apply(self, fn: Any, recurse: bool = True) -> "Hyper":
        if self._kept is not None:  # another device or type: kernels are written there
            self._kept.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]  # torch leaves it untyped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies write their own kernels


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


def device_of(model: nn.Module) -> torch.device:
    """Where a network's first parameter or buffer lies; the CPU for one without."""
    value = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if value is None else value.device


def spread_of(ensemble: Ensemble) -> Spread:
    """Over which processes the ensemble's training is spread at the moment."""
    return ensemble.spread if isinstance(ensemble, Members) else ALONE


def check_mixture(mixture: Sequence[float] | Tensor | None, num_members: int) -> Tensor:
    """(M,) float64 probabilities that sum to 1; uniform for None.

    Raises:
        ConfigError: for a wrong length, a negative or non-finite entry, or a sum other than 1.
    """
    if mixture is None:
        return torch.full((num_members,), 1 / num_members, dtype=torch.float64)
    try:
        probs = torch.as_tensor(mixture, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ConfigError(f"the mixture must be a list of probabilities, got {mixture!r}") from None
    if probs.shape != (num_members,):
        raise ConfigError(
            f"the mixture needs one probability for each of {num_members} members, "
            f"got shape {tuple(probs.shape)}"
        )
    if not bool((probs >= 0).all()) or abs(float(probs.sum()) - 1) > 1e-5:
        raise ConfigError(
            f"the mixture must hold probabilities that sum to 1, got {probs.tolist()}"
        )
    return probs / probs.sum()


MARKS: Final = frozenset({"num_members", "mixture", "logits_of", "member_logits"})
"""What a single network has no use for."""


def as_ensemble(model: object) -> Ensemble:
    """An ensemble as it is; a bare network as an ensemble of one; a list as independent members.

    Raises:
        InputError: for anything else, and for what has members and is no whole ensemble: taken for
            one network it would answer at random, and look better than it is.
    """
    if isinstance(model, nn.ModuleList):
        model = list(model)
    if isinstance(model, nn.Module):
        missing = lacking(model)
        if not missing:
            return cast(Ensemble, model)
        # one such name may be chance, as a network's own `mixture`
        if len(MARKS.intersection(missing)) <= len(MARKS) - 2:
            raise InputError(
                f"{type(model).__name__} looks like an ensemble, but has no {', '.join(missing)}: "
                "see redefense.types.Ensemble, or give [model] if it is one network"
            )
        return Independent([model])
    if isinstance(model, Sequence) and model and all(isinstance(m, nn.Module) for m in model):
        return Independent(model)
    raise _no_networks(model)


def _no_networks(model: object) -> InputError:
    got = type(model).__name__
    if isinstance(model, type):
        got = f"the class {model.__name__}: make a network of it"
    if isinstance(model, nn.Module):
        got += " where a list was asked for: put it into one"
    if isinstance(model, list | tuple):
        odd = (i for i, member in enumerate(model) if not isinstance(member, nn.Module))
        at = next(odd, None)
        got = f"an empty {got}" if at is None else f"{type(model[at]).__name__} as element {at}"
    return InputError(
        f"expected a network (torch.nn.Module), an ensemble or a list of networks, got {got}"
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; every submodule then gets its own mode back."""
    modes = [(child, mode_of(child)) for child in module.modules()]
    set_evaluation(module)
    try:
        yield
    finally:
        for child, training in modes:
            if training is not None:
                child.training = training


@contextmanager
def kernels_kept(module: nn.Module) -> Iterator[None]:
    """`Hyper.kernels_kept` for every `Hyper` in a module: its weights must not change within."""
    with ExitStack() as stack:
        for child in module.modules():
            if isinstance(child, Hyper):
                stack.enter_context(child.kernels_kept())
        yield


@contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """The weights are constants within the block: no gradient of theirs is computed or stored."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        with kernels_kept(module):
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm in train mode uses the batch's moments but leaves its running ones alone."""
    norms = [c for c in module.modules() if isinstance(c, _BatchNorm) and c.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True

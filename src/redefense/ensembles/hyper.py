"""PS-RED: ensembles whose convolution weights are written by hypernetworks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from redefense.ensembles.base import Ensemble
from redefense.limits import at_least, one_of
from redefense.models import hyper
from redefense.networks import copied
from redefense.types import Images, Logits


class Hyper(Ensemble):
    """PS-RED: M networks whose convolutions, but the first, are written by hypernetworks.

    Parameters, and what is saved, are stem, batch norm, classifier, embeddings and hypernetworks.
    Every forward pass generates the kernels of the queried member, so they are valid after any
    optimizer step or edit. While the weights are constant (a training step before the optimizer's,
    an attack, repeated inference), `kernels_kept` generates them once.

    Args:
        members: plain convolutional networks; their kernels are discarded.
        mixture: M probabilities, uniform unless given.
        unit: channels of a unit, 16, 32 or 64; must divide those of all generated kernels.
        embedding: dimension of a unit's embedding.
        hidden: d, width of the hypernetworks between their two layers, per channel of a unit.
        taps: reduction of nine taps to a 1x1 kernel: "mean", "max" or "sum".
        shared: one hypernetwork for all members in place of one each. Training members one after
            another then changes the earlier ones.
        rng: generator of the initial embeddings and hypernetworks.

    Attributes:
        grids: the generated kernels of each member.

    Raises:
        ConfigError: if units cannot tile a kernel, or an option is unknown.
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
        one_of("taps", taps, hyper.TAPS)
        at_least(1, embedding=embedding, hidden=hidden)
        self.unit, self.taps, self.shared = unit, taps, shared
        self.grids = [hyper.grids_of(net, unit) for net in members]
        # generated kernels must not be parameters, which would be trained and saved
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
        """(B, C) logits of member m. Inputs are not checked: inner loops may leave [0, 1]."""
        grids, sources = self.grids[m], self._sources(m)
        written = self._written(m)
        kernels = written.kernels
        # attacks freeze the weights: they need no graph through the hypernetwork
        if torch.is_grad_enabled() and any(s.requires_grad for s in sources):
            kernels = hyper.linked(written, grids, self.taps, sources)
        with hyper.with_kernels(self.members[m], grids, kernels) as net:
            return cast(Tensor, net(x))

    @contextmanager
    def kernels_kept(self) -> Iterator[None]:
        """Context in which each member's kernels are generated once, on first use.

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

    def written(self) -> list[Tensor]:
        """The currently cached kernels of all members."""
        return [k for one in (self._kept or {}).values() for k in one.kernels]

    def member(self, m: int) -> nn.Module:
        """Member m as a separate plain network with the current weights.

        Train the ensemble through `logits_of`; changes to this copy do not affect it.
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
        # `member` returns a copy here, whose mode would have no effect
        for m, net in enumerate(self.members):
            net.train(m in members)

    def _sources(self, m: int) -> tuple[Tensor, ...]:
        """The embeddings and the hypernetwork of member m's kernels."""
        writer = cast(hyper.Hypernetwork, self.writers[0 if self.shared else m])
        return (self.embeddings[m], *writer.sources())

    def _written(self, m: int) -> hyper.Written:
        """The kernels of member m, cached or generated now."""
        kept = {} if self._kept is None else self._kept
        if m not in kept:
            # neither a graph nor inference tensors, which training could not use later
            with torch.inference_mode(False), torch.no_grad():
                kept[m] = hyper.Written(hyper.write(self.grids[m], self.taps, self._sources(m)))
        return kept[m]

    def _apply(self, fn: Any, recurse: bool = True) -> "Hyper":
        if self._kept is not None:  # another device or type: kernels are generated there
            self._kept.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]  # torch leaves it untyped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies generate their own kernels

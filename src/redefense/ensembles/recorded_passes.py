"""Members' passes recorded once (as CUDA graphs are) and replayed with bit-identical results.

Attacks query a member's logits and their gradient with respect to the images. Both are recorded for
each member and batch shape; the attacks themselves are not. A recording is used only after a
**proof pass**: logits and gradient of other images are computed both ways and must be
bit-identical. On any error or difference all members are called directly from then on, and one line
reports why.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from redefense.ensembles.base import Ensemble
from redefense.ensembles.guards import kernels_kept
from redefense.ensembles.hyper import Hyper
from redefense.networks import mode_of
from redefense.runtime.recording import Recorder, Recording, RecordingError, digest, reason
from redefense.types import Images, Logits

SETTLING: Final = 10
"""Direct passes of a kind before one is recorded; a recording costs tens of passes."""

MOST: Final = 128
"""Maximum number of recordings; beyond it the least recently used one is discarded."""

ROOM: Final = 8 * 2**30
"""Maximum bytes of recordings; beyond it all are discarded."""

Answer = Callable[[Tensor], Tensor]


@dataclass(slots=True, eq=False)
class _Pass:
    """One member's pass at one shape.

    Attributes:
        x: memory from which the recording reads the images.
        forward: computes the logits, with their graph (activations included) for `backward`.
        backward: computes the gradient with respect to the images; None if not needed.
        cotangent: memory from which it reads the cotangents of the logits.
        turn: number of forward passes replayed.
        proven: whether a proof pass has agreed.
    """

    x: Tensor
    forward: Recording
    backward: Recording | None = None
    cotangent: Tensor | None = None
    turn: int = 0
    proven: bool = False

    @property
    def nbytes(self) -> int:
        return self.forward.nbytes + (0 if self.backward is None else self.backward.nbytes)

    def answer(self, x: Tensor) -> Tensor:
        """Logits of other images."""
        with torch.no_grad():
            self.x.copy_(x)
            self.forward.replay()
            self.turn += 1
            return self.forward.outputs[0].detach().clone()

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Gradient with respect to the images of the last `answer`, for given cotangents."""
        assert self.backward is not None
        assert self.cotangent is not None
        with torch.no_grad():
            self.cotangent.copy_(cotangent)
            self.backward.replay()
            return self.backward.outputs[0].clone()


class _Replayed(torch.autograd.Function):
    """Replays a pass, and its gradient on backward. First derivatives only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recorded: _Pass, answer: Answer) -> Tensor:
        logits = recorded.answer(x)
        ctx.recorded, ctx.answer, ctx.turn = recorded, answer, recorded.turn
        ctx.save_for_backward(x)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        recorded: _Pass = ctx.recorded
        (x,) = ctx.saved_tensors
        if not cotangent.is_contiguous():  # layouts may choose the algorithm, and so the bits
            return _gradient(ctx.answer, x, cotangent)[1], None, None
        if recorded.turn != ctx.turn:  # other images were replayed since
            recorded.answer(x)
            ctx.turn = recorded.turn
        return recorded.gradient(cotangent), None, None


def _gradient(answer: Answer, x: Tensor, cotangent: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, their gradient with respect to the images, and the cotangents used."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = answer(leaf)
    # any cotangents serve a proof: these differ per logit and need no random numbers
    cotangent = logits.detach().cos() if cotangent is None else cotangent
    (grad,) = torch.autograd.grad(logits, leaf, cotangent)
    return logits.detach(), grad, cotangent


class RecordedPasses(Ensemble):
    """An ensemble whose members' passes are replayed where the same kind of pass recurs.

    Created by `recorded`. Members must be in evaluation mode, and their weights must not move in
    memory. Passes are run directly the first times, where weights require gradients, under
    autocast, and for images on another device than the recorder's.

    Attributes:
        counts: passes that were `computed`, `proven` (both ways) and `replayed`.
        why: the reason why passes are no longer replayed.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        recorder: Recorder,
        log: Callable[[str], None],
        *,
        settling: int = SETTLING,
        most: int = MOST,
        room: int = ROOM,
    ) -> None:
        super().__init__(ensemble.num_members, None)
        # the same tensor, not a copy: `set_mixture` changes it in place
        self.mixture = ensemble.mixture
        self.ensemble, self.recorder = ensemble, recorder
        self.settling, self.most, self.room = settling, most, room
        self.counts: Counter[str] = Counter()
        self.why: str | None = None
        self._log = log
        self._asked: Counter[object] = Counter()
        self._dropped: Counter[object] = Counter()
        self._passes: OrderedDict[object, _Pass] = OrderedDict()
        self._params = [ensemble.parameters_of(m) for m in range(ensemble.num_members)]

    def logits_of(self, m: int, x: Images) -> Logits:
        """(B, C) logits of member m. Inputs are not checked: inner loops may leave [0, 1]."""
        with_grad = torch.is_grad_enabled() and x.requires_grad
        if not self._may_replay(m, x):
            return self._computed(m, x)
        # the memory format may choose the algorithm, and so the bits
        key = (m, x.shape, x.stride(), x.dtype, with_grad)
        known = self._passes.get(key)
        if known is None:
            self._asked[key] += 1
            # a discarded recording is recorded again only after as many direct passes
            if self._asked[key] > self.settling << self._dropped[key]:
                self._record(key, m, x, with_grad=with_grad)
            return self._aside(m, x)
        self._passes.move_to_end(key)
        if not known.proven:
            self._prove(known, m, x)
            return self._aside(m, x)
        self.counts["replayed"] += 1
        if not with_grad:
            return known.answer(x)
        logits: Tensor = _Replayed.apply(x, known, self._answer(m))  # type: ignore[no-untyped-call]  # untyped in torch
        return logits

    def parameters_of(self, m: int) -> list[nn.Parameter]:
        """The parameters of member m."""
        return self.ensemble.parameters_of(m)

    def forget(self) -> None:
        """Discard all recordings."""
        self._dropped.update(self._passes.keys())
        self._asked.clear()
        self._passes.clear()

    def _may_replay(self, m: int, x: Tensor) -> bool:
        return not (
            self.why is not None
            or x.numel() == 0
            # torch cannot save inference tensors for the backward pass
            or x.is_inference()
            or torch.is_inference_mode_enabled()
            or x.device != self.mixture.device
            or torch.is_autocast_enabled(x.device.type)
            or (torch.is_grad_enabled() and any(p.requires_grad for p in self._params[m]))
        )

    def _answer(self, m: int) -> Answer:
        return lambda x: self.ensemble.logits_of(m, x)

    def _computed(self, m: int, x: Tensor) -> Tensor:
        self.counts["computed"] += 1
        return self.ensemble.logits_of(m, x)

    def _aside(self, m: int, x: Tensor) -> Tensor:
        """A direct pass, to be recorded if possible."""
        with self.recorder.aside():
            return self._computed(m, x)

    def _record(self, key: object, m: int, x: Tensor, *, with_grad: bool) -> None:
        memory = torch.empty_like(x.detach()).zero_()
        if memory.stride() != x.stride():  # overlapping: no memory of its own is laid out so
            return
        if any(mode_of(part) for part in self.ensemble.modules()):
            self._refuse("members are in training mode")
            return
        try:
            made = self._recordings(m, memory, with_grad=with_grad)
        except Exception as error:  # noqa: BLE001 - whatever it is, the pass itself still counts
            self._refuse(f"they cannot be recorded ({reason(error)})")
            return
        while len(self._passes) >= self.most:
            oldest, _ = self._passes.popitem(last=False)
            self._asked[oldest] = 0
            self._dropped[oldest] += 1
        self._passes[key] = made
        if sum(known.nbytes for known in self._passes.values()) > self.room:
            self.forget()

    def _recordings(self, m: int, memory: Tensor, *, with_grad: bool) -> _Pass:
        reads = [memory, *_tensors(self.ensemble)]
        answer = self._answer(m)

        def forward() -> list[Tensor]:
            with torch.set_grad_enabled(with_grad):
                return [answer(memory.requires_grad_(with_grad))]

        first = self.recorder.record(forward, reads)
        if not with_grad:
            return _Pass(memory, first)
        (logits,) = first.outputs
        if not logits.requires_grad:
            raise RecordingError("a member's logits have no gradient")
        cotangent = torch.zeros_like(logits, memory_format=torch.contiguous_format).detach()

        def backward() -> list[Tensor]:
            # retained, since gradients may be computed repeatedly
            return list(torch.autograd.grad(logits, memory, cotangent, retain_graph=True))

        second = self.recorder.record(backward, [*reads, cotangent], after=first)
        return _Pass(memory, first, second, cotangent)

    def _prove(self, known: _Pass, m: int, x: Tensor) -> None:
        """The proof pass: compare a direct and a replayed pass."""
        answer = self._answer(m)
        try:
            with self.recorder.aside():
                if known.backward is None:
                    with torch.no_grad():
                        computed = [answer(x)]
                    cotangent = None
                else:
                    *computed, cotangent = _gradient(answer, x, None)
            replayed = [known.answer(x)]
            if cotangent is not None:
                replayed.append(known.gradient(cotangent))
            alike = torch.equal(digest(replayed), digest(computed))
        except Exception as error:  # noqa: BLE001 - whatever it is, the pass itself still counts
            self._refuse(f"they cannot be replayed ({reason(error)})")
            return
        if not alike:
            self._refuse("a replayed pass was not bit-identical to the direct pass")
            return
        self.counts["proven"] += 1
        known.proven = True

    def _refuse(self, why: str) -> None:
        self.why = f"members' passes are not replayed: {why}"
        self.forget()
        self._log(self.why)


def _tensors(module: nn.Module) -> list[Tensor]:
    """All constant tensors that passes read: weights, statistics and cached kernels."""
    written = (child.written() for child in module.modules() if isinstance(child, Hyper))
    return [*module.parameters(), *module.buffers(), *(t for found in written for t in found)]


@contextmanager
def recorded(
    ensemble: Ensemble,
    recorder: Recorder | None,
    log: Callable[[str], None],
    *,
    settling: int = SETTLING,
) -> Iterator[Ensemble]:
    """The ensemble with recorded passes, within the block; unchanged without a recorder.

    The weights must not change meanwhile.

    Args:
        ensemble: in evaluation mode.
        recorder: makes the recordings, on the ensemble's device.
        log: called with the reason why passes are no longer replayed.
        settling: direct passes of a kind before one is recorded.
    """
    if recorder is None:
        yield ensemble
        return
    with kernels_kept(ensemble):
        passes = RecordedPasses(ensemble, recorder, log, settling=settling)
        try:
            yield passes
        finally:
            passes.forget()

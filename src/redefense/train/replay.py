"""Training steps recorded once and replayed with bit-identical results.

A recording covers the computation between the batch and the gradients: the adversary, input
gradients, the penalty, each member's forward and backward passes, and the terms of the log. The
batch, the noise, reading and checking the terms, clipping and the optimizer are not recorded. A
recording is used only after a **proof step**: with another batch, noise and weights, terms,
gradients and batch norm's statistics are computed both ways and must be bit-identical. A step that
cannot be recorded, or is not identical, is not replayed: the stage continues without replay, and
one line reports why.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from redefense.ensembles import Ensemble
from redefense.rng import Draws
from redefense.runtime.phases import REPLAYED, phase
from redefense.runtime.progress import note
from redefense.runtime.recording import Recorder, Recording, RecordingError, digest, reason
from redefense.types import Batch, Progress

Compute = Callable[[Batch, torch.Generator], dict[str, Tensor]]
"""Accumulates the gradients of a step's loss in the parameters, and returns the terms of its log.
"""

SETTLING: Final = 2
"""Direct steps of a stage before one is recorded."""


# a recording holds the values that a loss has read as constants: it fits only where they are equal
class _Watched(Progress):
    """A step's position in training that records which of its fields a loss reads."""

    __slots__ = ("names",)

    names: set[str]

    def __init__(self, progress: Progress, names: set[str]) -> None:
        object.__setattr__(self, "names", names)
        super().__init__(progress.epoch, progress.epochs, progress.seed)

    def __getattribute__(self, name: str) -> Any:
        if name in Progress.__slots__:
            object.__getattribute__(self, "names").add(name)
        return object.__getattribute__(self, name)


@dataclass(slots=True, eq=False)
class RecordedSteps:
    """The gradients of the steps of one stage, computed or replayed.

    Attributes:
        recorder: makes recordings.
        ensemble: the trained ensemble; its mixture must not change within the stage.
        params: parameters whose gradients are computed.
        compute: computes a step.
        name: name of the stage, for messages.
        log: called with the reason why steps are not replayed.
        counts: steps that were `computed`, `proven` (both ways) and `replayed`.
    """

    recorder: Recorder
    ensemble: Ensemble
    params: Sequence[nn.Parameter]
    compute: Compute
    name: str
    log: Callable[[str], None] = note
    counts: Counter[str] = field(default_factory=Counter)
    _wait: int = SETTLING
    _refused: bool = False
    _proven: bool = False
    _read: set[str] = field(default_factory=set)
    _key: object = None
    _batch: Batch | None = None
    _draws: Draws | None = None
    _recording: Recording | None = None
    _names: list[str] = field(default_factory=list)

    def __call__(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Compute or replay a step. `rng` is the step's random stream."""
        if self._refused:
            return self._computed(batch, rng)
        if self._recording is not None and self._key != self._key_of(batch):
            self._drop()
            self._wait = 1  # libraries are initialised; the draws are to be recorded again
        if self._wait > 0:
            return self._noted(batch, rng)
        if self._recording is None:
            return self._recorded(batch, rng)
        return self._replayed(batch, rng) if self._proven else self._compared(batch, rng)

    @property
    def recording(self) -> Recording | None:
        """The proven recording; None if there is none."""
        return self._recording if self._proven else None

    def _computed(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        self.counts["computed"] += 1
        return self.compute(batch, rng)

    def _aside(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """A direct step, after which the next one may be recorded."""
        with self.recorder.aside():
            return self._computed(self._watched(batch), rng)

    def _watched(self, batch: Batch) -> Batch:
        return replace(batch, progress=_Watched(batch.progress, self._read))

    def _key_of(self, batch: Batch) -> object:
        """What a recording depends on besides the values in its memory."""
        layout = tuple((t.shape, t.stride(), t.dtype) for t in (batch.x, batch.y, batch.index))
        return layout, tuple((n, getattr(batch.progress, n)) for n in sorted(self._read))

    def _noted(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """A direct step whose draws are recorded."""
        self._wait -= 1
        self._draws = Draws(rng, batch.x.device)
        terms = self._aside(batch, self._draws)
        if not self._draws.repeats(rng):
            self._refuse("its loss draws numbers without redefense.rng.drawn")
        return terms

    def _recorded(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Record a step, and compute it directly."""
        assert self._draws is not None
        device = batch.x.device
        own = Draws(rng, device)  # a copy of the stream, which `renew` advances
        self._batch = replace(
            batch, x=batch.x.clone(), y=batch.y.clone(), index=batch.index.to(device, copy=True)
        )
        self._draws.renew(rng)
        reads = [
            *self.ensemble.parameters(), *self.ensemble.buffers(), self._batch.x, self._batch.y,
            self._batch.index, *(value for _, value in self._draws.made),
        ]  # fmt: skip
        try:
            with self.ensemble.mixture_known():
                self._recording = self.recorder.record(self._work, reads)
        except Exception as error:  # noqa: BLE001 - whatever it is, the step itself still counts
            self._refuse(f"they cannot be recorded ({reason(error)})")
            return self._computed(batch, own)
        terms = self._aside(batch, own)
        self._key = self._key_of(batch)
        return terms

    def _work(self) -> list[Tensor]:
        assert self._batch is not None
        assert self._draws is not None
        terms = self.compute(self._watched(self._batch), self._draws)
        self._names = [*terms]
        gradients = self._gradients()
        if len(gradients) < len(self.params):
            raise RecordingError("some parameters get no gradient")
        if self._draws.place != len(self._draws.made):
            raise RecordingError("the step draws fewer numbers than the one before it")
        return [*terms.values(), *gradients]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def _load(self, batch: Batch, rng: torch.Generator) -> Recording:
        """Copy a step's images and noise to the memory that the recording reads."""
        assert self._batch is not None
        assert self._draws is not None
        assert self._recording is not None
        self._batch.x.copy_(batch.x)
        self._batch.y.copy_(batch.y)
        self._batch.index.copy_(batch.index)
        self._draws.renew(rng)
        return self._recording

    def _replayed(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        self.counts["replayed"] += 1
        recording = self._load(batch, rng)
        with phase(REPLAYED):
            recording.replay()
        gradients = recording.outputs[len(self._names) :]
        for parameter, gradient in zip(self.params, gradients, strict=True):
            # the memory of the recording itself: the optimizer reads it before the next replay
            parameter.grad = gradient
        return dict(zip(self._names, recording.outputs, strict=False))

    def _compared(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """The proof step: replay, undo, compute directly, and compare."""
        own = Draws(rng, batch.x.device)  # a copy of the stream, which `_load` advances
        recording = self._load(batch, rng)
        # the replay updates them, and the direct step must find them as they were
        statistics = list(self.ensemble.buffers())
        before = [value.clone() for value in statistics]
        recording.replay()
        # checksums: a copy of all gradients would double their memory
        found = digest([*recording.outputs, *statistics])
        with torch.no_grad():
            for value, old in zip(statistics, before, strict=True):
                value.copy_(old)
        terms = self._aside(batch, own)
        alike = [*terms] == self._names and torch.equal(
            found, digest([*terms.values(), *self._gradients(), *statistics])
        )
        if not alike:
            self._refuse("a replayed step was not bit-identical to the direct step")
            return terms
        self.counts["proven"] += 1
        self._proven = True
        return terms

    def _refuse(self, why: str) -> None:
        self._refused = True
        self._drop()
        self.log(f"steps of stage {self.name!r} are not replayed: {why}")

    def _drop(self) -> None:
        self._recording, self._batch, self._proven = None, None, False

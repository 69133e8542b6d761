"""A replayed training step for benchmarks, and the number of launched operations."""

from collections.abc import Callable
from functools import partial

from redefense.config import OptimConfig
from redefense.defences import Defence
from redefense.ensembles import Ensemble
from redefense.rng import stream
from redefense.runtime.phases import REPLAYED, watched
from redefense.runtime.recording import Recorder, Recording
from redefense.train.loop import gradients, take_step
from redefense.train.op_counter import OpCounter
from redefense.train.optim import make_optimizer
from redefense.train.replay import SETTLING, RecordedSteps
from redefense.train.steps import Precision
from redefense.types import Batch


class ReplayedStep:
    """Steps of a method's first stage on one batch; a call takes the next step.

    Args:
        ensemble: the trained ensemble.
        defence: the method.
        batch: batch of all steps.
        optim: settings of the optimizer.
        precision: precision of the forward passes.
        recorder: makes recordings.
        seed: seed of the steps' streams.

    Attributes:
        why: the reason why steps are not replayed.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        defence: Defence,
        batch: Batch,
        *,
        optim: OptimConfig,
        precision: Precision,
        recorder: Recorder,
        seed: int = 0,
    ) -> None:
        stage = defence.stages(ensemble.num_members, 1)[0]
        params = [p for m in stage.members for p in ensemble.parameters_of(m)]
        self.why: list[str] = []
        self.steps = RecordedSteps(
            recorder, ensemble, params, partial(gradients, ensemble, stage, params, precision),
            stage.name, self.why.append,
        )  # fmt: skip
        self._taken = 0
        # a shared hypernetwork is among the parameters of every member
        optimizer = make_optimizer(list(dict.fromkeys(params)), optim)

        def take() -> None:
            take_step(
                ensemble, stage, batch, optimizer, params, lr=optim.lr, clip=optim.clip,
                precision=precision, total=self._taken, rng=stream(seed, "step", self._taken),
                # the checks of a first step are no part of the steps that are replayed
                first=False, compute=self.steps,
            )  # fmt: skip
            self._taken += 1

        self._take = take

    def __call__(self) -> None:
        """Take a step."""
        self._take()

    def prepared(self) -> Recording | None:
        """Take steps until they are replayed; return the recording, None if not possible."""
        for _ in range(SETTLING + 2):  # one is recorded, one is the proof step
            self()
        return self.steps.recording


def handed_over(take: Callable[[], object]) -> int:
    """Operations that the host launches in a step; a replayed recording counts as one.

    Views and the like, which do nothing on the device, are not counted.
    """
    counter = OpCounter()
    with counter, watched(counter):
        take()
    counts = counter.entries.items()
    replayed = counter.met[REPLAYED] > 0
    return sum(n for e, n in counts if e.phase != REPLAYED) + replayed

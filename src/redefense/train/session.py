"""Drives the training loop of a run: saves checkpoints, writes the log, and stops on signals."""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from redefense.config import Run
from redefense.data import Split
from redefense.data.loader import Loader
from redefense.defences import Defence, Stage
from redefense.defences.overfitting import one_step_accuracy, one_step_adversary, overfitted
from redefense.ensembles import Ensemble, evaluating, kernels_kept
from redefense.errors import Interrupted, RedefenseError
from redefense.results.accuracy import degenerate_members
from redefense.rng import draw_seed, seeded, stream
from redefense.runtime.folders import CHECKPOINTS
from redefense.runtime.mesh import Mesh
from redefense.runtime.progress import Counter, note
from redefense.runtime.recording import Recorder
from redefense.runtime.signals import stop_signals
from redefense.train.checkpoint import prune, save, step_folder
from redefense.train.loading import Signature
from redefense.train.log import Metrics
from redefense.train.loop import EpochEnded, Event, Position, SaveDue, Start, StepDone, fit
from redefense.types import correct

SAVE_INTERVAL = 30.0  # seconds, the most work that a killed process loses
VALIDATION_IMAGES = 2000
ONE_STEP_IMAGES = 256


@dataclass(slots=True)
class Session:
    """A training run in one process of a mesh.

    Attributes:
        stages: stages of the defence.
        validation: images for the validation after each epoch.
        signature: signature of the data, for checkpoints.
        start: position to resume from.
        members: (M,) clean accuracies after the last epoch; None before it.
    """

    run: Run
    out: Path
    defence: Defence
    stages: tuple[Stage, ...]
    ensemble: Ensemble
    loader: Loader
    validation: Split
    signature: Signature
    start: Start
    quiet: bool
    team: Mesh
    members: Tensor | None = None
    saved: float = 0.0

    def train(self, recorder: Recorder | None = None) -> None:
        """Train to the end, saving at least every 30 seconds and every epoch.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after saving.
            TrainingError: as `fit` does.
        """
        place = self.start.position
        steps = len(self.loader) * sum(stage.epochs for stage in self.stages)
        # within an epoch, even after its last step, its record is not written yet
        done = place.total - bool(place.step)
        metrics = Metrics(self.out, resume_step=done) if self.team.first else None
        progress = Counter(
            self.run.recipe, steps, unit="steps", done=place.total,
            log=None if self.quiet else note,
        )  # fmt: skip
        self.saved = time.monotonic()
        events = fit(
            self.ensemble, self.stages, self.loader, optim=self.run.optim, seed=self.run.seed,
            precision=self.run.precision, start=self.start, mesh=self.team, recorder=recorder,
        )  # fmt: skip
        try:
            # closed, so that the contexts within `fit` end here and not when it is collected
            with stop_signals() as stopping, closing(events):
                for event in events:
                    match event:
                        case StepDone():
                            progress.advance(1, f"loss {event.terms['total']:.3f}")
                            self._save_or_stop(event, stopping[0] if stopping else 0)
                        case EpochEnded():
                            self._log(event, metrics)
                        case SaveDue():
                            self._save(event)
                            if event.before and stopping:
                                raise self._stopped(event.before, stopping[0])
        finally:
            progress.close()
            if metrics is not None:
                metrics.close()
        if self.members is not None and not self.quiet:
            warn_degenerate(self.ensemble, self.members)

    def _save_or_stop(self, event: Event, signal: int) -> None:
        """Save after a step if due; stop on a signal of any process, 0 for none."""
        # all processes must save and stop at the same step: collectives wait for each of them
        stop, due = self.team.agree(signal, time.monotonic() - self.saved > SAVE_INTERVAL)
        if stop or due:
            self._save(event)
        if stop:
            raise self._stopped(f"after step {event.position.total}", stop)

    def _stopped(self, where: str, number: int) -> RedefenseError:
        return self.team.mark_reported(
            Interrupted(f"stopped {where}; continue with --resume", number)
        )

    def _save(self, event: Event) -> None:
        """Gather the weights of all processes, and write a checkpoint in the first one."""
        self.team.refresh(self.ensemble.state_dict(), self.ensemble.num_members)
        tensors = self.team.collect(event.optimizer.tensors())
        self.team.first_does(lambda: self._write(event.position, tensors, event.totals))
        # from the end of the save on: a slow disk must not make every step save
        self.saved = time.monotonic()

    def _write(
        self, position: Position, optimizer: Mapping[str, Tensor], sums: Mapping[str, float]
    ) -> None:
        """Write a checkpoint, and remove all older than the previous one."""
        save(
            step_folder(self.out / CHECKPOINTS, position.total),
            run=self.run,
            weights=self.ensemble.state_dict(),
            optimizer=optimizer,
            state={
                "position": position.as_dict(),
                "totals": dict(sums),
                "data": self.signature.as_dict(),
                "mesh": list(self.team.shape),
            },
        )
        # afterwards, so that a failed save removes nothing
        prune(self.out / CHECKPOINTS)

    def _log(self, event: EpochEnded, metrics: Metrics | None) -> None:
        """Measure on validation images, and write the record of an epoch."""
        # in every process, since members on other processes are evaluated there
        self.members = member_accuracies(self.ensemble, self.validation, self.run.batch_size)
        robust = self._one_step()
        if metrics is None:
            return
        stage, epoch, means = event.stage, event.position.epoch, event.totals
        clean = _expected(self.ensemble, self.members)
        metrics.write(
            event.position.total,
            {
                "stage": stage.name, "epoch": epoch, **means, "validation_accuracy": clean,
                "validation_members": self.members.tolist(), **robust,
            },
        )  # fmt: skip
        if not self.quiet:
            text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            note(
                f"{self.run.recipe} {stage.name} epoch {epoch}/{stage.epochs}: {text}  "
                f"validation accuracy {100 * clean:.1f} %"
            )

    def _one_step(self) -> dict[str, float]:
        """Accuracies that detect catastrophic overfitting to a one-step adversary."""
        if (adversary := one_step_adversary(self.defence)) is None:
            return {}
        index = torch.arange(min(len(self.validation), ONE_STEP_IMAGES))
        device = self.ensemble.mixture.device
        x, y = self.validation.float(index).to(device), self.validation.labels[index].to(device)
        found = one_step_accuracy(self.ensemble, adversary, x, y, self.run.seed)
        if self.team.first and (warning := overfitted(found)):
            note(warning)
        return found


def member_accuracies(ensemble: Ensemble, split: Split, batch_size: int) -> Tensor:
    """(M,) clean accuracy of every member on the first images of a split (2000 at most)."""
    device = ensemble.mixture.device
    right = torch.zeros(ensemble.num_members, dtype=torch.float64, device=device)
    count = min(len(split), VALIDATION_IMAGES)
    # layers that draw, as noise does, draw the same at each call
    drawing = seeded(draw_seed(stream(0, "accuracies")), device)
    with torch.no_grad(), evaluating(ensemble), kernels_kept(ensemble), drawing:
        for index in torch.arange(count).split(batch_size):
            logits = ensemble.member_logits(split.float(index).to(device))
            right += correct(logits, split.labels[index].to(device)).sum(1)
    return right / count


def accuracy(ensemble: Ensemble, split: Split, batch_size: int) -> float:
    """Exact expected clean accuracy on these images."""
    return _expected(ensemble, member_accuracies(ensemble, split, batch_size))


def _expected(ensemble: Ensemble, accuracies: Tensor) -> float:
    return float(ensemble.mixture.to(accuracies) @ accuracies)


def warn_degenerate(ensemble: Ensemble, accuracies: Tensor) -> None:
    """Warn of members with very low clean accuracy."""
    each = accuracies.tolist()
    if weak := degenerate_members(each, ensemble.mixture.tolist()):
        figures = ", ".join(f"member {m} is right on {100 * each[m]:.1f} %" for m in weak)
        note(
            f"{figures} of the validation images, the best member on {100 * max(each):.1f} %: a "
            "member below half of that answers most queries wrongly. Train longer, or with weaker "
            "penalties"
        )

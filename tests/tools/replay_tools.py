"""Settings of every method whose training steps can be recorded, and their steps on any device."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from redefense.config import OptimConfig
from redefense.defences import DEFENCES, Adversary, Defence, Stage
from redefense.ensembles import channels_last
from redefense.ensembles.configs import EnsembleConfig, HyperConfig, IndependentConfig
from redefense.rng import draw_seed, stream
from redefense.runtime.recording import Recorder
from redefense.train.loop import gradients, take_step
from redefense.train.optim import StageOptimizer, learning_rate
from redefense.train.replay import RecordedSteps
from redefense.types import Batch, Progress
from tape import TapeRecorder

SHAPE, SIZE, EPOCH = (3, 8, 8), 4, 6
SGD = OptimConfig(name="sgd", lr=0.1, weight_decay=5e-4, schedule="one-cycle")
CLIPPED = SGD.model_copy(update={"clip": 1.0})
ADAM = SGD.model_copy(update={"name": "adam", "lr": 1e-3})
NESTEROV = SGD.model_copy(update={"nesterov": True, "schedule": "constant"})
COSINE = ADAM.model_copy(update={"schedule": "cosine", "clip": 1.0})
MILESTONES = SGD.model_copy(update={"schedule": "steps", "milestones": (0.1, 0.2), "momentum": 0.0})
NORMED = IndependentConfig(model="resnet8", num_members=2, width=4)
LEAKY = replace(NORMED, activation="leaky")
PLAIN = IndependentConfig(model="digits-cnn", num_members=2, width=8)
WRITTEN = HyperConfig(model="digits-cnn", num_members=2, unit=16, embedding=3, hidden=3)
SMOOTH = replace(NORMED, activation="silu")
AVERAGED = OptimConfig(nesterov=True, decay_norms_and_biases=False, ema=0.9)
ADVERSARY = Adversary(steps=2, step_size=0.5)
NOISY = Adversary(attack="n-fgsm", steps=1, step_size=1.0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and how."""

    method: str = "red"
    settings: dict[str, Any] = field(default_factory=dict)
    kind: EnsembleConfig = NORMED
    precision: str = "fp32"
    optim: OptimConfig = SGD

    def defence(self) -> Defence:
        made = DEFENCES[self.method]
        known = made.__dataclass_fields__
        quick = {"adversary": ADVERSARY, "steps": 2}
        return made(**{**{k: v for k, v in quick.items() if k in known}, **self.settings})


ADVERSARIAL = {"adversarial_training": True}
SETTINGS: Final[Mapping[str, Setting]] = MappingProxyType({
    "red bf16": Setting(precision="bf16"),
    "red fp32": Setting(kind=PLAIN),
    "red clipped": Setting(kind=PLAIN, precision="bf16", optim=CLIPPED),
    "red adam": Setting(kind=PLAIN, optim=ADAM),
    "red smooth": Setting(
        settings={"label_smoothing": 0.1}, kind=SMOOTH, optim=AVERAGED
    ),
    "red finite": Setting(settings={"differentiate": "finite"}, kind=PLAIN),
    "red printed": Setting(settings={"preset": "printed"}, kind=PLAIN),
    "red released": Setting(settings={"preset": "released"}, kind=PLAIN),
    "red at": Setting(settings=ADVERSARIAL, kind=PLAIN, precision="bf16"),
    "ps-red": Setting(kind=WRITTEN),
    "ps-red shared": Setting(kind=replace(WRITTEN, shared=True), optim=ADAM),
    "vanilla": Setting(method="vanilla", precision="bf16"),
    "at": Setting(method="at", kind=PLAIN),
    "at independent": Setting(method="at", settings={"variant": "independent"}, kind=PLAIN),
    "at joint": Setting(method="at", settings={"variant": "joint"}, kind=PLAIN),
    "gal": Setting(method="gal", kind=LEAKY, optim=ADAM),
    "gal trs": Setting(method="gal", settings={"preset": "trs"}, kind=PLAIN),
    "gal finite": Setting(method="gal", settings={"differentiate": "finite"}, kind=PLAIN),
    "adp": Setting(method="adp", optim=ADAM),
    "adp at": Setting(method="adp", settings=ADVERSARIAL, kind=PLAIN, optim=ADAM),
    "dverge": Setting(method="dverge", kind=PLAIN),
    "dverge at": Setting(method="dverge", settings=ADVERSARIAL, kind=PLAIN),
    "trs": Setting(method="trs", settings={"steps": 1}, kind=PLAIN, optim=ADAM),
    "trs printed": Setting(method="trs", settings={"preset": "printed", "steps": 1}, kind=PLAIN),
    "mrboost": Setting(method="mrboost", kind=PLAIN, precision="bf16"),
    "mrboost mean": Setting(method="mrboost", settings={"individual": False}, kind=PLAIN),
    "barre": Setting(method="barre", kind=PLAIN),
    "fork": Setting(method="fork", kind=PLAIN),
    "fork subset": Setting(method="fork", settings={"apart": "subset"}, kind=PLAIN),
    "snapshots": Setting(method="snapshots", kind=PLAIN),
    "n-fgsm": Setting(method="at", settings={"adversary": NOISY}, kind=PLAIN),
    "nesterov": Setting(method="vanilla", kind=PLAIN, optim=NESTEROV),
    "cosine": Setting(method="vanilla", kind=PLAIN, optim=COSINE),
    "milestones": Setting(method="vanilla", kind=PLAIN, optim=MILESTONES),
})  # fmt: skip
EPOCHS_DIFFER = {"trs", "trs printed", "dverge", "dverge at"}


class Training:
    """Steps of the last stage of a method, plain or recorded."""

    def __init__(
        self,
        setting: Setting,
        *,
        recorded: bool,
        stage: Stage | None = None,
        recorder: Recorder | None = None,
        device: str = "cpu",
    ) -> None:
        self.setting, self.device = setting, torch.device(device)
        built = setting.kind.build(num_classes=10, shape=SHAPE, seed=0)
        self.ensemble = channels_last(built.to(self.device))
        stages = setting.defence().stages(self.ensemble.num_members, 9)
        for one in stages:
            if one.before is not None:
                one.before(self.ensemble)
        self.stage = stage or stages[-1]
        self.trained = StageOptimizer(self.ensemble, self.stage.members, setting.optim)
        self.params, self.optimizer = self.trained.params, self.trained.optimizer
        compute = partial(
            gradients,
            self.ensemble,
            self.stage,
            self.params,
            setting.precision,  # type: ignore[arg-type]  # one of two
        )
        self.recorder, self.said = recorder or TapeRecorder(), list[str]()
        self.recorded = RecordedSteps(
            self.recorder, self.ensemble, self.params, compute, self.stage.name, self.said.append
        )
        self.compute = self.recorded if recorded else compute
        self.terms: list[dict[str, float]] = []

    def step(self, k: int, x: Tensor | None = None) -> None:
        rng = stream(5, "data", k)
        images = torch.rand(SIZE, *SHAPE, generator=rng) if x is None else x
        labels = torch.randint(10, (SIZE,), generator=rng)
        epoch = k // EPOCH
        progress = Progress(epoch, 9, draw_seed(stream(0, "epoch", epoch)))
        x, y, index = (t.to(self.device) for t in (images, labels, torch.arange(SIZE)))
        found = take_step(
            self.ensemble, self.stage, Batch(x, y, index, progress), self.optimizer, self.params,
            lr=learning_rate(self.setting.optim, k, 20),
            clip=self.setting.optim.clip, precision="fp32", total=k, rng=stream(0, "step", k),
            first=k == 0, compute=self.compute,
        )  # fmt: skip
        self.terms.append(found)

    def steps(self, first: int, last: int) -> "Training":
        for k in range(first, last):
            self.step(k)
        return self

    def state(self) -> dict[str, Tensor]:
        """Weights, statistics and the optimizer's state."""
        found = self.ensemble.state_dict() | self.trained.tensors()
        return {name: t.clone() for name, t in found.items()}

    def resumed(self) -> "Training":
        """A new process that goes on with what this one has saved."""
        other = Training(self.setting, recorded=True)
        other.ensemble.load_state_dict(self.ensemble.state_dict())
        average = self.trained.average
        done = 0 if average is None else average.updates
        other.trained.restore(self.state(), updates=done)
        return other

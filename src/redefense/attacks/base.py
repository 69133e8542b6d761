"""Base class of attacks: frozen settings, checked inputs, and `perturb` without side effects.

An attack is a frozen, keyword-only dataclass derived from `Attack`; its fields are its settings,
its class attributes declare its properties, and `perturb` implements it. Add one line to `ATTACKS`
and the conformance tests check it against the contract.

Presets, decided once for all attacks: a class that reproduces published settings has the field
`preset: str | None = None` and the class attribute `presets`, a mapping from the preset's name to
the values it fixes:

    presets: ClassVar[Presets] = {"torchattacks-3.5.1": {"steps": 50, "c": 1.0}}

`Attack.__post_init__` refuses unknown names, refuses a field that contradicts the preset and fills
the fixed fields in, so that `repr` shows what runs; then it calls `check()`, where a class
validates its fields. Quirks (noise shared by the batch, success filters, ...) are switched on
`self.preset is not None` inside `perturb`. A preset may depend on the batch mates.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import ClassVar, Final, Literal, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from redefense.attacks.objectives import LEAST_CLASSES, margin
from redefense.ensembles import as_ensemble, frozen_statistics, frozen_weights
from redefense.ensembles.precision import cast_input, rounded
from redefense.errors import ConfigError, InputError, RedefenseError
from redefense.networks import check_values, differentiating
from redefense.radius import norm_text
from redefense.rng import system_stream
from redefense.threat import Threat, checked_threat, norms
from redefense.types import Bool, Float, Images, Int, Labels, check_images, check_labels, correct

Presets = Mapping[str, Mapping[str, object]]

TORCHATTACKS: Final = "torchattacks-3.5.1"
OFFICIAL: Final = "autoattack-official"
RED_RELEASED: Final = "red-released"


STEPS: Final = MappingProxyType({TORCHATTACKS: 10, OFFICIAL: 100, RED_RELEASED: 10})
"""Steps of the parts of AutoAttack in each published setting."""

Distortion = tuple[Literal["l0", "l2", "linf"], float]
"""A measure of distortion and its limit, such as an L2 distance or a number of pixels."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Base class: searches, for each image, a point on which the victim errs.

    Attacks run in the victim's current mode and have no side effects: modes, parameter gradients,
    `requires_grad` flags, running statistics and the global generators are unchanged.

    Attributes:
        adaptive: takes the ensemble with all its members; a plain module counts as one member.
        bounded: the result stays inside the threat's ball.
        stated: for attacks that are not bounded, the distortion at which they are scored.
        norms: the threat norms it can attack in.
        randomized: draws from `rng`.
        takes_starts: accepts points found by other attacks as starts; implements `perturb_from`.
        summary: one line for `redefense list attacks`.
        presets: published settings by name, see the module's docstring.
    """

    adaptive: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    stated: ClassVar[Distortion | None] = None
    norms: ClassVar[tuple[float, ...]] = (math.inf, 2.0)
    randomized: ClassVar[bool] = True
    takes_starts: ClassVar[bool] = False
    summary: ClassVar[str] = ""
    presets: ClassVar[Presets] = {}

    def __init_subclass__(cls) -> None:
        if cls.bounded != (cls.stated is None):
            raise TypeError(
                f"{cls.__name__}: `stated` must be set if `bounded = False`, and only then"
            )

    def __post_init__(self) -> None:
        if (name := getattr(self, "preset", None)) is not None:
            self._fill_in(name)
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type is int
            if (whole or field.type is float) and (
                isinstance(value, bool) or not isinstance(value, Integral if whole else Real)
            ):
                kind = "whole number" if whole else "number"
                raise ConfigError(f"{field.name} must be a {kind}, got {value!r}")
        self.check()

    def _fill_in(self, name: str) -> None:
        if name not in self.presets:
            known = ", ".join(self.presets) or "none"
            raise ConfigError(f"{type(self).__name__} has no preset {name!r}; known: {known}")
        defaults = {f.name: f.default for f in fields(self)}
        for key, value in self.presets[name].items():
            # a field left at its default counts as not given: dataclasses do not record which were
            given = getattr(self, key)
            if defaults[key] is not MISSING and given not in (defaults[key], value):
                raise ConfigError(f"preset {name!r} fixes {key}={value!r}, got {given!r}")
            # the class is frozen; this runs within its construction
            object.__setattr__(self, key, value)

    @property
    def scored_at(self) -> Distortion | None:
        """`stated`, where a setting of the attack does not change it."""
        return self.stated

    @property
    def least_classes(self) -> int:
        """Smallest number of classes that these settings support; fewer raise ConfigError."""
        return LEAST_CLASSES.get(getattr(self, "loss", ""), 2)

    def check(self) -> None:  # noqa: B027 - not every attack has something to validate
        """Validate the settings.

        Raises:
            ConfigError: naming the field, the rule and the value.
        """

    @final
    def check_threat(self, threat: Threat) -> None:
        """Check that the attack can be used at a threat.

        Raises:
            ConfigError: if it does not support the norm, or for another object.
        """
        checked_threat(threat)
        if threat.norm not in self.norms:
            known = " or ".join(norm_text(n) for n in self.norms)
            raise ConfigError(
                f"{type(self).__name__} attacks within {known}, not {norm_text(threat.norm)}: "
                "choose another attack or another norm"
            )

    @final
    def __call__(
        self,
        victim: nn.Module,
        x: Images,
        y: Labels,
        threat: Threat,
        *,
        rng: torch.Generator | None = None,
        starts: Tensor | None = None,
    ) -> Images:
        """Check the input, then perturb.

        Args:
            victim: images in [0, 1] to logits (B, C); adaptive attacks take an `Ensemble` too.
            x: clean images in [0, 1].
            y: their labels, in [0, C).
            threat: norm and radius of the allowed perturbation.
            rng: the source of all randomness; the operating system's entropy unless given.
            starts: (K, B, ch, H, W), K >= 1 points of the ball for each image, e.g. the best that
                other attacks found, to start from as well; only for attacks with `takes_starts`.

        Returns:
            Perturbed images in [0, 1], detached, same shape and type as `x`.

        Raises:
            InputError: the images or labels are invalid, or the victim does not accept them.
            ConfigError: the attack does not support the threat's norm, the victim's number of
                classes, or starts.
        """
        check_images(x)
        check_labels(y, len(x))
        rng = system_stream() if rng is None else rng
        self.check_threat(threat)
        if not isinstance(victim, nn.Module):
            victim = cast(nn.Module, as_ensemble(victim))
        # otherwise a network without values fails inside the attack, with a message of torch
        check_values(victim)
        with (
            # a caller's inference mode would forbid the gradients of the images
            torch.inference_mode(False),
            torch.no_grad(),
            frozen_weights(victim),
            frozen_statistics(victim),
        ):
            # a tensor made in inference mode cannot require gradients; a clone made here can
            x = x.detach().clone() if x.is_inference() else x.detach()
            y = (y.clone() if y.is_inference() else y).long()
            # half precision is too coarse for steps and for sums over pixels
            at = x.float() if x.dtype.itemsize < 4 else x
            if starts is not None:
                starts = self._check_starts(starts, at, threat)
            target = cast_input(victim, x)
            try:
                if starts is None:
                    found = self.perturb(target, at, y, threat, rng=rng)
                else:
                    found = self.perturb_from(target, at, y, threat, starts, rng=rng)
                return rounded(found.detach(), x, threat if self.bounded else None)
            except RedefenseError:
                raise
            except Exception:
                # checked afterwards: checking before would cost every attack a query
                logits = as_ensemble(target).logits_of(0, at[:1])
                check_labels(y, len(x), logits.shape[-1])
                raise

    @abstractmethod
    def perturb(
        self, victim: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        """The attack itself, without checks: no device synchronisation before the first step.

        Training calls this directly, with gradients of the weights off
        (`ensembles.frozen_weights`).
        """

    def perturb_from(
        self,
        victim: nn.Module,
        x: Images,
        y: Labels,
        threat: Threat,
        starts: Float[Tensor, "K B ch H W"] | None,
        *,
        rng: torch.Generator,
    ) -> Images:
        """Like `perturb`, with additional starting points inside the ball."""
        raise NotImplementedError(
            f"{type(self).__name__} declares `takes_starts` but does not implement `perturb_from`"
        )

    def _check_starts(self, starts: Tensor, x: Images, threat: Threat) -> Tensor:
        """The starts in the dtype of `x`, projected to the ball."""
        name = type(self).__name__
        if not self.takes_starts:
            raise ConfigError(f"{name} does not accept starts; omit `starts`")
        if starts.ndim != 5 or len(starts) == 0 or starts.shape[1:] != x.shape:
            raise InputError(
                f"starts must be of shape (K, {', '.join(map(str, x.shape))}) with K >= 1, "
                f"got {tuple(starts.shape)}"
            )
        check_images(starts.flatten(0, 1), "starts")
        starts = starts.detach().clone() if starts.is_inference() else starts.detach()
        starts = starts.to(x.dtype)
        farthest = max(float(norms(start - x, threat.norm).max()) for start in starts)
        # slack for starts that were computed or stored in single precision
        if farthest > threat.eps * (1 + 1e-4) + 1e-6:
            raise InputError(
                f"starts must lie within {threat.eps:g} of their images, got {farthest:g}"
            )
        # within the slack above, exactly into the ball
        return torch.stack([threat.project(start, x) for start in starts])


class OracleResult(NamedTuple):
    """Result of an oracle's evaluation of a batch of points.

    Attributes:
        value: (B,) the objective, larger is better for the attacker.
        correct: (B,) probability that the victim is correct (0 or 1 for a plain module).
        grad: (B, ch, H, W) gradient of the summed objective, finite; None if not requested.
    """

    value: Float[Tensor, " B"]
    correct: Float[Tensor, " B"]
    grad: Tensor | None


Oracle = Callable[[Tensor, bool], OracleResult]
"""Evaluates points (B, ch, H, W); the flag requests the gradient."""


def input_gradient(values: Tensor, x: Images, *, keep_graph: bool = False) -> Images:
    """Gradient of summed values with respect to `x`, zero where it is undefined.

    A victim whose output does not depend on the input, or whose gradient is not finite, gives
    zeros and not an error: the attacks then rely on their random starts.
    """
    if not values.requires_grad:
        return torch.zeros_like(x)
    # attacks run under `no_grad`, where a sum would have no graph
    with torch.enable_grad():
        total = values.sum()
    with differentiating():
        (grad,) = torch.autograd.grad(total, x, retain_graph=keep_graph, allow_unused=True)
    # nan_to_num also replaces infinities, by the largest numbers: their direction counts
    return torch.zeros_like(x) if grad is None else grad.nan_to_num(nan=0.0)


def dual(norm: float) -> float:
    """The norm of gradients that measures distances in `norm` (inf or 2)."""
    return 1.0 if norm == math.inf else 2.0


@dataclass
class Best:
    """The best point so far for each image: lowest expected accuracy, then highest objective.

    The initial points have no score, so the first offer is taken. An offer replaces a point only if
    it is strictly better, so with `value=-inf` only correctness counts.
    """

    x: Tensor
    correct: Tensor
    value: Tensor

    @classmethod
    def start(cls, x: Images) -> "Best":
        worst = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        return cls(x, worst, -worst)

    def select(self, rows: Int[Tensor, " K"]) -> "Best":
        """A copy for some of the images; write it back with `update`."""
        return Best(self.x[rows], self.correct[rows], self.value[rows])

    def update(self, rows: Int[Tensor, " K"], part: "Best") -> None:
        """Write back the records of some of the images."""
        # copies, not changes in place: callers may still hold the earlier tensors
        self.x = self.x.index_copy(0, rows, part.x)
        self.correct = self.correct.index_copy(0, rows, part.correct)
        self.value = self.value.index_copy(0, rows, part.value)

    def judge(self, victim: nn.Module, rows: Int[Tensor, " K"], x: Images, y: Labels) -> None:
        """Query a victim at points for some of the images, and offer them by their margins."""
        with torch.no_grad():
            logits = victim(x)
        part = self.select(rows)
        part.offer(x, correct(logits, y).to(x.dtype), margin(logits, y))
        self.update(rows, part)

    def offer(
        self, x: Images, correct: Float[Tensor, " B"], value: Float[Tensor, " B"]
    ) -> Bool[Tensor, " B"]:
        """Replace points by better ones; return a mask of those replaced."""
        value = value.to(self.value.dtype)
        correct = correct.to(self.correct.dtype)
        better = (correct < self.correct) | ((correct == self.correct) & (value > self.value))
        self.x = torch.where(better.view(-1, 1, 1, 1), x, self.x)
        self.correct = torch.where(better, correct, self.correct)
        self.value = torch.where(better, value, self.value)
        return better


def batch_noise(x: Images, low: float, high: float, rng: torch.Generator) -> Images:
    """Uniform numbers in [low, high), one tensor for the batch, as the presets draw."""
    # torch draws only on the generator's own device
    noise = torch.empty(x.shape, dtype=x.dtype, device=rng.device)
    return noise.uniform_(low, high, generator=rng).to(x.device)

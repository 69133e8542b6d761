"""The class that every ensemble derives from: members, the mixture and the views of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import redefense
from redefense.config import Run
from redefense.errors import ConfigError, InputError
from redefense.networks import query
from redefense.runtime.spread import SINGLE_PROCESS, Spread
from redefense.types import Float, Images, Logits, Per, check_images, has_no_values


@dataclass(frozen=True, slots=True)
class Origin:
    """Run and data that an ensemble was trained from, needed to export it.

    Attributes:
        run: the resolved run.
        data: name, classes, shape and checksum of its data.
        path: the folder that it was written to or read from.
    """

    run: Run
    data: Mapping[str, Any]
    path: Path


class Ensemble(nn.Module):
    """M classifiers and the probabilities with which each answers a query.

    A subclass implements `member` or `logits_of`.

    Attributes:
        num_members: M.
        mixture: (M,) float64 probabilities with which members answer.
        origin: run and data of a trained ensemble; None for one built by hand.
        shape: of the images that it was trained on; None if it is not known.
        spread: the processes over which its training is currently distributed.
        together: number of members that `logits_of_each` computes in one call.
    """

    mixture: Tensor
    origin: Origin | None = None
    shape: tuple[int, int, int] | None = None
    spread: Spread = SINGLE_PROCESS
    together: int = 1
    _shares: list[float] | None = None

    def __init__(self, num_members: int, mixture: Sequence[float] | Tensor | None) -> None:
        super().__init__()
        if num_members < 1:
            raise ConfigError(f"an ensemble needs at least one member, got {num_members}")
        self.num_members = num_members
        # a buffer, so that it is saved with the weights and moves with them
        self.register_buffer("mixture", check_mixture(mixture, num_members))

    def set_mixture(self, mixture: Sequence[float] | Tensor) -> None:
        """Replace the sampling probabilities, in place.

        Raises:
            ConfigError: if they are not M probabilities that sum to 1.
        """
        # recorded passes read this memory
        self.mixture.copy_(check_mixture(mixture, self.num_members))

    def shares(self) -> list[float]:
        """The mixture as Python numbers; within `mixture_known` without device synchronisation."""
        return self.mixture.tolist() if self._shares is None else self._shares

    def probabilities(self) -> NDArray[np.float64]:
        """(M,) the mixture as a numpy array, for figures computed without torch."""
        found: NDArray[np.float64] = self.mixture.detach().double().cpu().numpy()
        return found

    @contextmanager
    def mixture_known(self) -> Iterator[None]:
        """Context in which `shares` uses the mixture read on entry; it must not change."""
        self._shares = self.shares()
        try:
            yield
        finally:
            self._shares = None

    def logits_of(self, m: int, x: Images) -> Logits:
        """(B, C) logits of member m. Inputs are not checked: inner loops may leave [0, 1]."""
        return query(self.member(m), x)

    def logits_of_each(self, members: Sequence[int], xs: Sequence[Images]) -> Sequence[Logits]:
        """Logits of some members, each for its own images (as many for each)."""
        return [self.logits_of(m, x) for m, x in zip(members, xs, strict=True)]

    def member(self, m: int) -> nn.Module:
        """Member m as a network; by default one that queries `logits_of`."""
        from redefense.ensembles.views import MemberOf  # views are made of this class

        if type(self).logits_of is Ensemble.logits_of:
            raise TypeError(f"{type(self).__name__} must implement `member` or `logits_of`")
        return MemberOf(self, m)

    def member_logits(self, x: Images) -> Float[Tensor, "M B C"]:
        """Logits of all members. Inputs are not checked."""
        own = self.spread.own(self.num_members)
        copies = self.spread.copies(x, self.num_members)
        logits = [self.logits_of(m, at) for m, at in zip(own, copies, strict=True)]
        return self.spread.members(torch.stack(logits))

    def parameters_of(self, m: int) -> list[nn.Parameter]:
        """The parameters that training member m alone would change."""
        return list(self.member(m).parameters())

    def train_members(self, members: Sequence[int]) -> None:
        """Train mode for these members, evaluation mode for all others."""
        for m in range(self.num_members):
            self.member(m).train(m in members)

    def averaged(self) -> nn.Module:
        """The deterministic ensemble: log of the mixture-weighted mean probability."""
        from redefense.ensembles.views import Averaged  # views are made of this class

        return Averaged(self)

    def sampled(self, *, rng: torch.Generator | None = None, per: Per = "call") -> nn.Module:
        """Random sampling inference: a new member is drawn per forward call, or per image.

        Without `rng` members are drawn from the operating system's entropy.
        """
        from redefense.ensembles.views import Sampled  # views are made of this class

        return Sampled(self, rng=rng, per=per)

    def save_pretrained(self, folder: str | Path, **settings: Any) -> Path:
        """Save this ensemble in the model hub layout; see `redefense.save_pretrained`."""
        # imported on use: this package must not import higher layers
        return redefense.save_pretrained(self, folder, **settings)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Save this ensemble and upload it; see `redefense.push_to_hub`."""
        return redefense.push_to_hub(self, repo_id, **settings)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **settings: Any) -> "Ensemble":
        """Load an ensemble of this class; see `redefense.from_pretrained`.

        Raises:
            InputError: if it is of another class.
        """
        found = redefense.from_pretrained(name_or_folder, **settings)
        if not isinstance(found, cls):
            raise InputError(
                f"{name_or_folder} holds an ensemble of the kind {type(found).__name__}, "
                f"not {cls.__name__}"
            )
        return found

    def forward(self, x: Tensor) -> Logits:
        """(B, C) logits; the member that answers is drawn separately for each image.

        Raises:
            InputError: if x is not (B, ch, H, W), floating point, finite and in [0, 1], or its
                shape is not that of the training images, where known.
        """
        check_images(x)
        if self.shape is not None and x.shape[1:] != self.shape:
            raise InputError(
                f"images must be {self.shape} as in training, got {tuple(x.shape[1:])}"
            )
        return cast(Tensor, self.sampled(per="image")(x))


def device_of(model: nn.Module) -> torch.device:
    """The device of a network's first parameter or buffer; the CPU if it has none."""
    value = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if value is None else value.device


def check_mixture(mixture: Sequence[float] | Tensor | None, num_members: int) -> Tensor:
    """(M,) float64 probabilities that sum to 1; uniform for None.

    Raises:
        ConfigError: for a wrong length, a negative or non-finite entry, or a sum other than 1.
    """
    if mixture is None:
        return torch.full((num_members,), 1 / num_members, dtype=torch.float64)
    try:
        given = (
            mixture if isinstance(mixture, Tensor) else torch.tensor(mixture, dtype=torch.float64)
        )
        probs = given.detach().to(torch.float64)
    # torch raises any of these for text, nested lists and huge integers
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ConfigError(f"the mixture must be a list of probabilities, got {mixture!r}") from None
    if has_no_values(probs):
        raise ConfigError("the mixture must be a list of probabilities, got a meta tensor")
    if probs.shape != (num_members,):
        raise ConfigError(
            f"the mixture needs one probability for each of {num_members} members, "
            f"got shape {tuple(probs.shape)}"
        )
    # written so that NaN fails, too; 1e-5 admits mixtures stored in single precision
    if not bool((probs >= 0).all()) or abs(float(probs.sum()) - 1) > 1e-5:
        raise ConfigError(
            f"the mixture must hold probabilities that sum to 1, got {probs.tolist()}"
        )
    # exactly one in double precision, whatever rounding was admitted
    return probs / probs.sum()


def channels_last(ensemble: Ensemble) -> Ensemble:
    """The memory layout in which convolutions run fastest."""
    return ensemble.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # torch's stub lacks it

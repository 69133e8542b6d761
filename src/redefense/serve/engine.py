"""Inference: draws a member per image, runs each member once, returns what was requested."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from redefense.serve.draws import Draw, Ensemble, Floats
from redefense.serve.model import Model
from redefense.serve.settings import Settings

CONFIDENCE: Final = ("low", "medium", "high")
EDGES: Final = (0.5, 0.9)
"""A label's probability is low below the first, high from the second on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Answers for N images.

    Attributes:
        label: (N,) class indices; -1 where logits are NaN.
        confidence: (N,) indices into `CONFIDENCE`.
        scores: (N, classes) probabilities, if enabled.
        member: (N,) members that answered, on research servers only.
    """

    label: NDArray[np.int64]
    confidence: NDArray[np.int64]
    scores: Floats | None = None
    member: Ensemble | None = None

    def part(self, start: int, stop: int) -> "Answers":
        """The answers to images start to stop."""
        return Answers(
            label=self.label[start:stop],
            confidence=self.confidence[start:stop],
            scores=None if self.scores is None else self.scores[start:stop],
            member=None if self.member is None else self.member[start:stop],
        )


def probabilities(logits: Floats) -> Floats:
    """Softmax over the last axis; NaN where logits are."""
    # NaN is answered with the label -1, and needs no warning
    with np.errstate(invalid="ignore"):
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: Floats = (shifted / shifted.sum(-1, keepdims=True)).astype(np.float32)
    return result


def label_and_word(scores: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Label (...) and confidence word (...) from probabilities (..., classes).

    The label is -1 where these are NaN: `argmax` would return a class.
    """
    words = np.digitize(scores.max(-1), EDGES).astype(np.int64)
    known = np.isfinite(scores).all(-1)
    return np.where(known, scores.argmax(-1), -1).astype(np.int64), words


class Engine:
    """Classifies a batch whose images may belong to several requests.

    Answers do not depend on the rest of the batch except for rounding, and all answers of a batch
    are ready at the same time. Neither the order nor, unless images are grouped, the number of runs
    reveals which images share a member.
    """

    def __init__(self, model: Model, settings: Settings, draw: Draw) -> None:
        self._settings = settings
        self.use(model, draw)

    def use(self, model: Model, draw: Draw) -> None:
        """Use this model from the next batch on; a running batch is not affected."""
        # one assignment: a batch never combines a model with another one's draw
        self._serving = model, draw

    @property
    def model(self) -> Model:
        return self._serving[0]

    def __call__(self, images: Floats, clients: Sequence[str]) -> Answers:
        """Answers to images (N, C, H, W) of the clients (N,)."""
        model, draw = self._serving
        member = None
        if self._settings.mode == "averaged":
            mixture = model.mixture.astype(np.float32)
            scores = np.einsum("m,mnc->nc", mixture, _all_members(model, images))
        elif self._settings.mode == "member":
            scores = probabilities(model.logits_of(0, images))
        else:
            member = draw(images, clients)
            logits = model.classify(images, member, grouped=self._settings.grouped)
            scores = probabilities(logits)
        label, word = label_and_word(scores)
        if self._settings.tick > 0:
            # monotonic time modulo the tick: the grid is the same for every batch
            time.sleep(-time.monotonic() % self._settings.tick)
        return Answers(
            label=label,
            confidence=word,
            scores=scores if self._settings.scores else None,
            member=member if self._settings.research else None,
        )

    def all_members(self, images: Floats) -> Floats:
        """(M, N, classes) probabilities of every member."""
        return _all_members(self.model, images)


def _all_members(model: Model, images: Floats) -> Floats:
    return np.stack([probabilities(model.logits_of(m, images)) for m in range(model.num_members)])

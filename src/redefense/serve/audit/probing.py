"""Determines from the members' outputs which of them may have given an answer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from redefense.errors import InputError
from redefense.serve.audit.client import Reply
from redefense.serve.draws import Floats
from redefense.serve.engine import CONFIDENCE, EDGES, label_and_word, probabilities
from redefense.serve.model import Model

# nearer to a threshold between answers, rounding could change the answer
_MARGIN = 0.01
_CANDIDATES = (64, 2048)
_SECONDS = 20.0  # limit of the search for images

Answer = tuple[int, int]
"""Class and index of the confidence word."""


@dataclass(frozen=True, slots=True)
class Subjects:
    """Images and each member's answers, sorted by how well they distinguish members.

    Attributes:
        images: (N, C, H, W), 8-bit values.
        answers: (M, N, 2) classes and words.
        mixture: (M,).
        seconds: time of one image through a member.
    """

    images: Floats
    answers: NDArray[np.int64]
    mixture: NDArray[np.float64]
    seconds: float

    def collision(self) -> NDArray[np.float64]:
        """(N,) probability that two draws give the same answer; 1 where the members agree."""
        same = (self.answers[:, None] == self.answers[None]).all(-1)  # (M, M, N)
        return np.asarray(np.einsum("i,j,ijn->n", self.mixture, self.mixture, same))

    def witness(self, n: int, answer: Answer, rng: np.random.Generator) -> int | None:
        """A member with this answer to image n, drawn by the mixture; None if there is none.

        If the server's draws follow the mixture, so do these, whether or not the members differ.
        """
        fits = (self.answers[:, n] == answer).all(-1) * self.mixture
        return int(rng.choice(len(fits), p=fits / fits.sum())) if fits.sum() > 0 else None

    def first(self, count: int) -> "Subjects":
        return Subjects(self.images[:count], self.answers[:, :count], self.mixture, self.seconds)


def answers_in(reply: Reply) -> list[Answer]:
    """The answers of a reply for each image.

    Raises:
        InputError: it is incomplete.
    """
    if reply.status != 200:
        raise InputError(f"the server answered {reply.status}: {reply.body[:200]!r}")
    words = [CONFIDENCE.index(word) for word in reply.output("confidence")]
    return list(zip(reply.output("class_id"), words, strict=True))


def find_subjects(model: Model, rng: np.random.Generator) -> Subjects:
    """Search images on which members differ: probes, mixed with each other and noise.

    Raises:
        InputError: the members agree on all of them, so that draws cannot be observed.
    """
    probes = model.probes()
    # a large model gets fewer candidates, a tiny one not more than are useful
    started = time.perf_counter()
    _all_members(model, probes[:8])
    seconds = (time.perf_counter() - started) / (8 * model.num_members)
    affordable = int(_SECONDS / (seconds * model.num_members))
    count = min(max(affordable, _CANDIDATES[0]), _CANDIDATES[1])
    share = rng.random((count, 1, 1, 1), dtype=np.float32)
    first, second = (probes[rng.integers(len(probes), size=count)] for _ in range(2))
    noise = rng.normal(0, 0.2, first.shape).astype(np.float32)
    # between two classes and under noise members disagree; at whole levels every encoding agrees
    mixed = np.rint((share * first + (1 - share) * second + noise).clip(0, 1) * 255)
    images = (mixed / np.float32(255)).astype(np.float32)
    answers, sure = _all_members(model, images)
    found = Subjects(images[sure], answers[:, sure], model.mixture, seconds)
    order = found.collision().argsort(kind="stable")
    found = Subjects(found.images[order], found.answers[:, order], model.mixture, seconds)
    if len(order) < 2:
        raise InputError(
            f"only {len(order)} of {count} images are far from every threshold between answers, "
            "and two are needed: the members cannot be told apart"
        )
    if found.collision()[0] > 1 - 1e-9:
        raise InputError(
            f"all members answer all {len(order)} images equally, so draws cannot be observed"
        )
    return found


def _scores(model: Model, images: Floats) -> Floats:
    """(M, N, classes) probabilities of all members."""
    chunks = [
        np.stack([probabilities(model.logits_of(m, part)) for m in range(model.num_members)])
        for part in np.array_split(images, max(1, len(images) // 32))
    ]
    return np.concatenate(chunks, axis=1)


def _all_members(model: Model, images: Floats) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Answers (M, N, 2) of all members, and a mask (N,) of images far from all thresholds."""
    scores = _scores(model, images)
    label, word = label_and_word(scores)
    # lead of the best class over the next; a single class has no next
    ranked = np.sort(scores, axis=-1)[..., ::-1]
    clear = ranked[..., 0] - ranked[..., 1:2].sum(-1) > _MARGIN
    for edge in EDGES:
        clear &= np.abs(scores.max(-1) - edge) > _MARGIN
    return np.stack([label, word], axis=-1), np.asarray(clear.all(0))


def guess_rate(answers: NDArray[np.int64], mixture: NDArray[np.float64]) -> float:
    """Accuracy of the best guess of the member, from answers (M, N) coded as numbers."""
    rates = [
        sum(mixture[column == value].max() for value in np.unique(column)) for column in answers.T
    ]
    return float(np.mean(rates))


def distinguished(model: Model, images: Floats, served: Sequence[str]) -> dict[str, float]:
    """Accuracy of guessing the member from nothing, from labels, and from the served fields."""
    scores = _scores(model, images)
    label, word = label_and_word(scores)
    rates = {
        "nothing": float(model.mixture.max()),
        "labels": guess_rate(label, model.mixture),
        "served": guess_rate(label * len(CONFIDENCE) + word, model.mixture),
    }
    if "scores" in served:
        # scores are compared by all their digits: one digit may tell the member
        distinct = np.unique(scores.reshape(-1, scores.shape[-1]), axis=0, return_inverse=True)[1]
        rates["served"] = guess_rate(distinct.reshape(label.shape), model.mixture)
    return rates

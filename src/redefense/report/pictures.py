"""Attacked images for the page: clean image, attacked image, and magnified perturbation."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from redefense.report.sentences import PERCENT
from redefense.results.examples import Examples
from redefense.results.join import Result
from redefense.results.records import Stored, mixture_of

LARGEST: Final = 96
"""Largest width and height in pixels, which limits the size of the page."""

Pixels = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One image of the page.

    Attributes:
        clean, attacked, change: PNG as data URI; `change` is grey where it is zero.
        times: factor by which the change is magnified.
        label: the true class.
        attack: the attack that found the image.
        fooled: the fooled members.
        odds: probability that the draw is correct.
    """

    number: int
    clean: str
    attacked: str
    change: str
    times: str
    label: int
    attack: str
    fooled: str
    odds: str


def png(pixels: Pixels) -> str:
    """A PNG as data URI, from (C, H, W) in [0, 1] with one or three channels."""
    # rounded, so that images that were stored as bytes are shown exactly
    values = np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    image = Image.fromarray(values[0] if len(values) == 1 else values[:3].transpose(1, 2, 0))
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST))
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def magnified(change: Pixels) -> tuple[Pixels, float]:
    """The change on grey, scaled so that its largest value is black or white, and the factor."""
    largest = float(np.abs(change).max(initial=0))
    if largest == 0:
        return np.full_like(change, 0.5), 1.0
    times = 0.5 / largest
    return 0.5 + times * change, times


def pictures(result: Result) -> list[Shown]:
    """The images of a result; empty if no examples are stored."""
    known = [(s, s.examples) for s in result.suites if s.examples is not None]
    if not known:
        return []
    # of several suites the one with the lowest accuracy
    stored, examples = min(known, key=lambda pair: float(_odds(*pair).mean()))
    labels = {c.cell.id: c.label for c in (*stored.cells, *stored.further)}
    odds = _odds(stored, examples)
    return [_shown(examples, k, labels, float(odds[k])) for k in range(len(examples.index))]


def _odds(stored: Stored, examples: Examples) -> NDArray[np.float64]:
    """(k,) probability that the draw is correct."""
    correct = examples.correct.astype(np.float64)
    # fresh draws are equally probable
    if stored.evaluation.stochastic or not len(correct):
        return correct.mean(0) if len(correct) else np.zeros(correct.shape[1])
    found: NDArray[np.float64] = mixture_of(stored.evaluation, len(correct)) @ correct
    return found


def _shown(examples: Examples, k: int, labels: Mapping[str, str], odds: float) -> Shown:
    clean, attacked = examples.clean[k], examples.attacked[k]
    change, times = magnified(attacked - clean)
    attack = str(examples.attack[k])
    return Shown(
        number=int(examples.index[k]),
        clean=png(clean),
        attacked=png(attacked),
        change=png(change),
        times=f"{times:.0f}" if times >= 10 else f"{times:.1f}",
        label=int(examples.label[k]),
        attack="No attack changed that"
        if attack == "clean"
        else f"Found by: {labels.get(attack, attack)}",
        fooled=_fooled(examples, k),
        odds=f"{100 * odds:.0f}{PERCENT}",
    )


def _fooled(examples: Examples, k: int) -> str:
    """The fooled members and their predictions."""
    right = examples.correct[:, k]
    if not len(examples.predicted):  # draws have no indices
        return f"{int((~right).sum())} of {len(right)} fresh draws are wrong"
    predicted = examples.predicted[:, k]
    wrong = [f"member {m} predicts {predicted[m]}" for m in np.flatnonzero(~right)]
    if len(right) == 1:
        return f"the network predicts {predicted[0]}" if wrong else "the network is correct"
    if not wrong:
        return "no member is fooled"
    return f"{len(wrong)} of {len(right)} members fooled: {', '.join(wrong)}"

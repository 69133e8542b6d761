"""Answers that are no numbers: NaN is wrong for every label, in figures and in every attack."""

import math

import pytest
import torch
from torch import Tensor

from redefense.types import correct

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("row", "winner"),
    [
        ([1.0, 3.0, 2.0], 1),
        ([1.0, -INF, 2.0], 2),
        ([-INF, -INF, -5.0], 2),
        ([1.0, INF, 2.0], 1),
        ([NAN, 3.0, 2.0], None),
        ([1.0, 3.0, NAN], None),
        ([NAN, NAN, NAN], None),
        ([NAN, INF, 0.0], None),
        ([-INF, -INF, -INF], None),
        ([INF, INF, 0.0], None),
    ],
)
def test_an_answer_is_right_for_its_one_highest_class_whatever_its_number(
    row: list[float], winner: int | None
) -> None:
    logits, classes = torch.tensor(row), torch.arange(3)
    for shift in classes.tolist():
        moved = logits.roll(shift).expand(2, 3, 3)  # two members, one image per label
        right = correct(moved, classes)
        wanted: Tensor = classes == (-1 if winner is None else (winner + shift) % 3)
        assert torch.equal(right, wanted.expand(2, 3))
        assert torch.equal(correct(moved[0].half(), classes), wanted)

"""Calls that break a signature of redefense fail in the test run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from redefense.penalties import lipschitz
from redefense.threat import Threat
from redefense.types import Float
from type_checks import checked


@checked
def first(x: Float[Tensor, "A B"], y: Float[Tensor, " B"]) -> Float[Tensor, " A"]:
    return x[:, 0] if len(y) < 5 else y


@checked
def share(value: float, *more: float, **named: float) -> float:
    return value if value < 1 else "much"  # type: ignore[return-value]  # on purpose


@checked
def numbers(limit: int) -> Iterator[int]:
    yield limit


@checked
@dataclass(frozen=True)
class Point:
    height: float


def defined_within() -> tuple[Callable[..., Any], ...]:
    """The same functions, defined anew in each call."""

    @checked
    def first(x: Float[Tensor, "A B"], y: Float[Tensor, " B"]) -> Float[Tensor, " A"]:
        return x[:, 0] if len(y) < 5 else y

    @checked
    def share(value: float, *more: float, **named: float) -> float:
        return value if value < 1 else "much"  # type: ignore[return-value]  # on purpose

    return first, share


@pytest.mark.parametrize("made", [lambda: (first, share), defined_within], ids=["module", "local"])
def test_arguments_and_results_are_checked(made: Callable[[], tuple[Any, Any]]) -> None:
    made()
    first, share = made()  # defined once more
    assert first(torch.ones(3, 2), torch.ones(2)).shape == (3,)
    assert share(0.5, 0.1, more=0.2) == 0.5
    for wrong in (
        lambda: first(torch.ones(3), torch.ones(3)),  # the number of axes
        lambda: first(torch.ones(3, 2), torch.ones(3)),  # one name, two sizes
        lambda: first(torch.ones(3, 2).long(), torch.ones(2)),  # the type of numbers
        lambda: first(torch.ones(3, 6), torch.ones(6)),  # the result's size
        lambda: share(0),
        lambda: share(0.5, 1),
        lambda: share(0.5, more=1),
        lambda: share(2.0),
    ):
        with pytest.raises(TypeError):
            wrong()  # type: ignore[no-untyped-call]  # lambdas have no types


def test_sizes_of_one_call_bind_no_other() -> None:
    @checked
    def outer(x: Float[Tensor, "A B"]) -> Float[Tensor, "A B"]:
        assert first(x.mT, x[:, 0]).shape == x.mT[:, 0].shape
        return x

    assert outer(torch.ones(3, 4)).shape == (3, 4)


def test_generators_and_dataclasses_are_checked() -> None:
    assert list(numbers(3)) == [3]
    assert Point(0.5).height == 0.5
    for wrong in (lambda: numbers(0.5), lambda: Point(1)):
        with pytest.raises(TypeError):
            wrong()


def test_redefense_is_checked() -> None:
    for wrong in (lambda: lipschitz(torch.ones(2, 3)), lambda: Threat(eps=1)):
        with pytest.raises(TypeError):
            wrong()

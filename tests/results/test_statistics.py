"""Intervals hold what they promise: closed forms, invariances, coverage."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from redefense.errors import InputError
from redefense.results.intervals import (
    Estimate,
    accuracy_interval,
    bootstrap_mean,
    difference_over_seeds,
    exact_expectation,
    fooled_histogram,
    over_seeds,
    paired_difference,
    success_within,
    wilson,
)

Z = 1.959963984540054


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (50, 100), (999, 1000), (7, 7)])
def test_wilson_ends_solve_the_score_equation(k: int, n: int) -> None:
    # the ends are the shares p at which (k/n - p)^2 = z^2 p (1 - p) / n
    for p in wilson(k, n):
        assert (k / n - p) ** 2 == pytest.approx(Z**2 * p * (1 - p) / n, abs=1e-12)


def test_wilson_at_the_borders_is_exact_and_symmetric() -> None:
    low, high = wilson(0, 100)
    assert low == 0.0
    assert high == pytest.approx(Z**2 / (100 + Z**2))
    assert wilson(100, 100) == pytest.approx((1 - high, 1.0), abs=1e-15)


def test_wilson_covers_at_its_level() -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.5):
        ends = [wilson(int(k), 200) for k in rng.binomial(200, share, 2000)]
        covered = np.mean([low <= share <= high for low, high in ends])
        assert 0.92 < covered < 0.98


def test_bootstrap_of_a_constant_is_that_constant() -> None:
    assert bootstrap_mean(np.full(50, 0.25), seed=3) == (0.25, 0.25)


def test_bootstrap_width_is_the_normal_one_for_many_images() -> None:
    q = np.random.default_rng(1).choice([0.0, 1 / 3, 2 / 3, 1.0], size=5000)
    low, high = bootstrap_mean(q, seed=0, resamples=20_000)
    half = Z * q.std() / math.sqrt(len(q))
    assert low == pytest.approx(q.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(q.mean() + half, abs=0.05 * half)


def test_bootstrap_by_distinct_values_equals_drawing_images() -> None:
    q = np.random.default_rng(2).choice([0.0, 0.5, 1.0], size=40)
    drawn = q[np.random.default_rng(3).integers(0, 40, (20_000, 40))].mean(1)
    slow = np.quantile(drawn, [0.025, 0.975])
    assert bootstrap_mean(q, seed=0, resamples=20_000) == pytest.approx(slow, abs=0.013)


def test_bootstrap_repeats_and_does_not_see_the_order_of_images() -> None:
    q = np.random.default_rng(4).random(3000)
    first = bootstrap_mean(q, seed=7)
    assert first == bootstrap_mean(q[::-1], seed=7)
    assert first != bootstrap_mean(q, seed=8)


def test_bootstrap_covers_at_its_level() -> None:
    rng = np.random.default_rng(5)
    levels, weights = np.array([0.0, 0.5, 1.0]), [0.5, 0.2, 0.3]
    hits = 0
    for trial in range(400):
        low, high = bootstrap_mean(rng.choice(levels, 200, p=weights), trial, resamples=500)
        hits += low <= 0.4 <= high
    assert 0.91 < hits / 400 < 0.98


def test_accuracy_of_zeros_and_ones_gets_wilson_so_zero_is_never_certain() -> None:
    assert accuracy_interval(np.zeros(360)) == Estimate(0.0, *wilson(0, 360))
    assert accuracy_interval(np.r_[np.ones(3), np.zeros(7)]) == Estimate(0.3, *wilson(3, 10))


def test_accuracy_of_expectations_gets_the_bootstrap() -> None:
    q = np.array([0.0, 0.5, 1.0, 1.0])
    assert accuracy_interval(q, seed=2) == Estimate(0.625, *bootstrap_mean(q, 2))


def test_paired_difference_of_counts_is_bonett_and_price() -> None:
    a, b = np.repeat([1, 1, 0, 0], [30, 12, 5, 53]), np.repeat([1, 0, 1, 0], [30, 12, 5, 53])
    p12, p21 = 13 / 102, 6 / 102
    half = Z * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    got = paired_difference(a, b)
    assert got == pytest.approx((0.07, p12 - p21 - half, p12 - p21 + half))


def test_paired_difference_changes_sign_with_its_arguments() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.random(50), rng.random(50)
    value, low, high = paired_difference(a, b)
    assert low is not None
    assert high is not None
    assert paired_difference(b, a) == pytest.approx((-value, -high, -low))


def test_equal_predictions_are_not_certainly_equal() -> None:
    value, low, high = paired_difference(np.ones(98), np.ones(98))
    assert value == 0
    assert high == pytest.approx(Z * math.sqrt(2) / 100)
    assert low == pytest.approx(-Z * math.sqrt(2) / 100)


def test_paired_difference_covers_and_is_tighter_than_unpaired() -> None:
    rng = np.random.default_rng(7)
    hits, widths = 0, []
    for _ in range(1000):
        b = rng.random(200) < 0.5
        a = b ^ (rng.random(200) < 0.1)  # flips one in ten: the true difference is 0
        _, low, high = paired_difference(a, b)
        assert low is not None
        assert high is not None
        hits += low <= 0 <= high
        widths.append(high - low)
    assert 0.92 < hits / 1000 < 0.99
    assert np.mean(widths) < 2 * Z * math.sqrt(2 * 0.25 / 200)


def test_histogram_counts_fooled_members() -> None:
    correct = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=bool)
    assert fooled_histogram(correct).tolist() == [1, 1, 2]


def test_more_tries_help_the_attacker_only_where_members_disagree() -> None:
    success = success_within(np.array([1.0, 0.5, 0.0]), 3)
    assert success.tolist() == pytest.approx([0.5, 1 - 1.25 / 3, 1 - 1.125 / 3])
    assert success_within(np.array([1.0, 0.0]), 5).tolist() == [0.5] * 5


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: wilson(3, 2), "0 <= k <= n"),
        (lambda: wilson(0, 0), "n >= 1"),
        (lambda: wilson(1, 2, level=1.0), "level"),
        (lambda: bootstrap_mean([], 0), "non-empty"),
        (lambda: bootstrap_mean([float("nan")], 0), "finite"),
        (lambda: bootstrap_mean([1.0], 0, resamples=0), "resamples"),
        (lambda: accuracy_interval([1.5]), r"\[0, 1\]"),
        (lambda: paired_difference([1.0], [1.0, 0.0]), "same images"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call: Callable[[], object], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        call()


@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=18),
    n=st.integers(1, 50),
)
def test_what_all_members_answer_is_certain_whatever_the_probabilities(
    weights: list[float], n: int
) -> None:
    mixture = np.array(weights) / sum(weights)
    q = exact_expectation(np.ones((len(weights), n), dtype=bool), mixture)
    assert q.tolist() == [1.0] * n
    assert accuracy_interval(q) == Estimate(1.0, *wilson(n, n))
    half = exact_expectation(np.arange(len(weights))[:, None] % 2 == 0, mixture)
    assert half[0] == pytest.approx(mixture[::2].sum())


def test_an_interval_is_never_surer_than_as_many_images_allow() -> None:
    # a resample of 40 images misses the only wrong one in a third of all cases
    nearly = np.r_[np.full(39, 0.999), 0.998]
    assert accuracy_interval(nearly).low == wilson(40, 40)[0] < bootstrap_mean(nearly, 0)[0]
    wrong = accuracy_interval(1 - nearly)
    assert wrong.high == wilson(0, 40)[1]


@pytest.mark.parametrize(
    ("seeds", "spread"), [(2, 0.0), (2, 0.02), (3, 0.05), (5, 0.03)], ids=lambda value: f"{value}"
)
def test_intervals_over_seeds_and_images_hold_the_truth_of_both(seeds: int, spread: float) -> None:
    """Trainings that differ by luck, on images that differ: the mean over all of both is 0.5."""
    rng = np.random.default_rng(0)

    def trained(images: NDArray[np.float64]) -> NDArray[np.float64]:
        p = 0.5 + spread * rng.standard_normal((seeds, 1)) + images
        return (rng.random((seeds, 200)) < p).astype(np.float64)

    held = paired = over_images = 0
    rounds = 150
    for _ in range(rounds):
        images = rng.uniform(-0.3, 0.3, 200)
        one, other = trained(images), trained(images)
        _, low, high = over_seeds(one)
        assert low is not None
        assert high is not None
        held += low <= 0.5 <= high
        _, low, high = accuracy_interval(one.mean(0))
        over_images += (low or 0) <= 0.5 <= (high or 0)
        _, low, high = difference_over_seeds(one, other)
        paired += (low or 0) <= 0 <= (high or 0)
    assert held / rounds >= 0.95
    assert paired / rounds >= 0.95
    if spread >= 0.03:  # images alone do not tell of the luck of a training
        assert over_images / rounds < 0.9


def test_with_one_seed_the_interval_is_that_over_images_and_more_never_narrow_it() -> None:
    q = np.random.default_rng(0).random(50)
    assert over_seeds(q[None]) == accuracy_interval(q)
    assert difference_over_seeds(q[None], q[None, ::-1]) == paired_difference(q, q[::-1])
    same, one = over_seeds(np.stack([q, q])), accuracy_interval(q)
    assert same.value == one.value
    assert (same.low or 1) <= (one.low or 0)
    assert (same.high or 0) >= (one.high or 1)


def test_the_interval_over_two_seeds_of_equal_images_is_students() -> None:
    """Where images do not differ, only the seeds' means do: t with one degree of freedom."""
    found = over_seeds(np.stack([np.full(4000, 0.49), np.full(4000, 0.51)]))
    assert found.low is not None
    assert 0.5 - found.low == pytest.approx(12.7062 * 0.01, rel=1e-4)

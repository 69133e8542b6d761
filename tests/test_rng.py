"""Named streams, streams of single images, and draws of members."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redefense.rng import (
    Draws,
    ImageStreams,
    draw_members,
    draw_seed,
    drawn,
    seed_from,
    stream,
    system_integers,
    system_uniform,
)

CPU = torch.device("cpu")


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4, generator=stream(seed, "images"))


def test_a_stream_is_named_by_seed_and_path() -> None:
    first = torch.rand(5, generator=stream(1, "a", 2))
    assert torch.equal(first, torch.rand(5, generator=stream(1, "a", 2)))
    for other in (stream(2, "a", 2), stream(1, "a", 3), stream(1, "b", 2)):
        assert not torch.equal(first, torch.rand(5, generator=other))


def test_an_image_draws_the_same_numbers_whatever_its_batch_mates() -> None:
    x, y = images(6), torch.arange(6)
    together = ImageStreams.of(stream(0), x, y)
    numbers = [together.uniform(3), together.uniform(2, 2)]
    alone = ImageStreams.of(stream(0), x[4:5], y[4:5])
    assert torch.equal(alone.uniform(3)[0], numbers[0][4])
    assert torch.equal(alone.uniform(2, 2)[0], numbers[1][4])
    assert torch.equal(together.select(torch.tensor([4])).uniform(7)[0], together.uniform(7)[4])


def test_images_labels_and_seeds_give_unrelated_streams() -> None:
    x, y = images(1), torch.zeros(1, dtype=torch.long)
    base = ImageStreams.of(stream(0), x, y).uniform(1000)
    for other in (
        ImageStreams.of(stream(1), x, y),
        ImageStreams.of(stream(0), x.flip(-1), y),  # the same pixels elsewhere
        ImageStreams.of(stream(0), x, y + 1),
    ):
        correlation = torch.corrcoef(torch.cat([base, other.uniform(1000)]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(1000)


def test_the_numbers_of_a_stream_are_uniform_and_uncorrelated() -> None:
    u = ImageStreams.of(stream(0), images(200), torch.zeros(200, dtype=torch.long)).uniform(500)
    n = u.numel()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * n)
    counts = (u * 64).long().flatten().bincount(minlength=64).double()
    chi_square = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    lagged = (u[:, 1:] - 0.5) * (u[:, :-1] - 0.5) * 12
    assert abs(float(lagged.mean())) < 4 / math.sqrt(lagged.numel())


@given(st.integers(-5, 5), st.integers(1, 9))
def test_integers_stay_in_their_range_and_reach_all_of_it(low: int, span: int) -> None:
    streams = ImageStreams.of(stream(0), images(4), torch.zeros(4, dtype=torch.long))
    drawn = streams.integers(low, low + span, 400)
    assert set(drawn.flatten().tolist()) == set(range(low, low + span))


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize(
    "mixture", [[1 / 3] * 3, [1 / 8] * 8, [0.5, 0.0, 0.2, 0.3], [1.0], [0.0, 1.0]]
)
def test_members_are_drawn_as_the_mixture_says(mixture: list[float], seeded: bool) -> None:
    n, probs = 60_000, torch.tensor(mixture, dtype=torch.float64)
    drawn = draw_members(probs, n, stream(3, "draw") if seeded else None)
    counts = drawn.bincount(minlength=len(mixture)).double()
    assert len(counts) == len(mixture)
    assert bool((counts[probs == 0] == 0).all())
    spread = 4.5 * (n * probs * (1 - probs)).sqrt()
    assert bool(((counts - n * probs).abs() <= spread).all())


def test_seeded_draws_repeat_and_secret_ones_do_not() -> None:
    uniform = torch.full((8,), 1 / 8, dtype=torch.float64)
    first, again = (draw_members(uniform, 64, stream(0, "draw")) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(draw_members(uniform, 64), draw_members(uniform, 64))
    assert not torch.equal(system_uniform(8), system_uniform(8))


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_members(torch.tensor([0.5, 0.5]), 10)
    draw_members(torch.tensor([0.5, 0.5]), 10, stream(0))
    ImageStreams.of(stream(0), images(2), torch.zeros(2, dtype=torch.long)).uniform(3)
    assert torch.equal(before, torch.get_rng_state())


def test_rejection_sampling_refuses_bounds_it_cannot_serve() -> None:
    assert set(system_integers(3, 300).tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="bound must lie in"):
        system_integers(0, 1)


def test_kept_draws_are_those_of_the_plain_stream_and_are_renewed_in_place() -> None:
    def draw_all(rng: torch.Generator) -> list[torch.Tensor]:
        return [
            drawn(rng, lambda g: torch.rand(4, generator=g), CPU),
            torch.as_tensor(seed_from(rng)),
            drawn(rng, lambda g: torch.randint(9, (), generator=g), CPU),
        ]

    draws = Draws(stream(0, "first"), CPU)
    found = draw_all(draws)
    assert all(map(torch.equal, found, draw_all(stream(0, "first"))))
    assert draws.repeats(stream(0, "first"))
    draws.renew(stream(0, "second"))
    assert all(map(torch.equal, found, draw_all(stream(0, "second"))))
    assert all(a is b for a, b in zip(draw_all(draws), found, strict=True))
    with pytest.raises(RuntimeError, match="more numbers"):
        seed_from(draws)


def test_draws_past_the_function_that_keeps_them_are_noticed() -> None:
    draws = Draws(stream(0), CPU)
    seed_from(draws)
    torch.rand(2, generator=draws)
    assert not draws.repeats(stream(0))


def test_a_given_seed_gives_the_streams_of_a_generator_that_draws_it() -> None:
    x, y = images(3), torch.zeros(3, dtype=torch.long)
    seed = draw_seed(stream(5))
    for known in (seed, torch.tensor(seed)):
        keys = ImageStreams.of(known, x, y).keys
        assert torch.equal(keys, ImageStreams.of(stream(5), x, y).keys)

"""OnePixel and Pixle find what can be found, anywhere in the image, and presets are bit for bit."""

from typing import cast

import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from redefense.attacks.base import Attack
from redefense.attacks.pixels import OnePixel, StreamProposals, numpy_states, paint
from redefense.attacks.pixle import Pixle, StreamPatches, move_pixels
from redefense.errors import ConfigError
from redefense.rng import ImageStreams, stream
from redefense.threat import Threat, norms

PRESET = "torchattacks-3.5.1"
THREAT = Threat()


def attacked(attack: Attack, victim: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return attack(victim, x, y, THREAT, rng=stream(0, "test"))


class Corner(nn.Module):
    """Says 1 if the last pixel of the last row is bright in its first channel, else 0."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, 0, -1, -1] - 0.9
        return torch.stack([-bright, bright], dim=1)


class Deaf(nn.Module):
    """Always says 0, whatever it is shown."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).to(x).expand(len(x), 2)


def dark_images(count: int = 3, height: int = 6, width: int = 9) -> tuple[Tensor, Tensor]:
    rng = stream(2, "images")
    x = 0.5 * torch.rand(count, 3, height, width, dtype=torch.float64, generator=rng)
    return x, torch.zeros(count, dtype=torch.long)


def test_onepixel_finds_the_one_decisive_pixel_in_the_corner() -> None:
    x, y = dark_images()
    x_adv = attacked(OnePixel(), Corner(), x, y)
    assert (Corner()(x_adv).argmax(1) == 1).all()
    changed = (x_adv != x).any(1)
    assert (changed.flatten(1).sum(1) == 1).all()
    assert changed[:, -1, -1].all()


@pytest.mark.parametrize("pixels", [1, 3])
def test_onepixel_changes_no_more_pixels_than_it_may(pixels: int) -> None:
    x, y = dark_images()
    x_adv = attacked(OnePixel(pixels=pixels, steps=3, popsize=20), Deaf(), x, y)
    changed = norms(x_adv - x, 0.0)
    assert (changed <= pixels).all()
    assert (changed >= 1).all()  # a failure is no reason to hand back the clean image


def test_pixle_copies_the_bright_pixel_into_the_corner() -> None:
    x, y = dark_images()
    x[:, :, 3, 4] = 1.0
    x_adv = attacked(Pixle(restarts=50), Corner(), x, y)
    assert (Corner()(x_adv).argmax(1) == 1).all()
    torch.testing.assert_close(x_adv[:, :, -1, -1], x[:, :, 3, 4])


def test_a_failed_pixle_is_not_the_clean_image() -> None:
    x, y = dark_images()
    x_adv = attacked(Pixle(restarts=2, iterations=2), Deaf(), x, y)
    assert (norms(x_adv - x, 0.0) > 0).all()


@pytest.mark.parametrize("kind", [OnePixel, Pixle])
def test_an_image_leaves_as_soon_as_it_is_fooled(kind: type[Attack]) -> None:
    seen: list[int] = []
    victim = Deaf()
    victim.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    x, _ = dark_images()
    attacked(kind(), victim, x, torch.ones(len(x), dtype=torch.long))  # all wrong from the start
    assert sum(seen) <= 100 * len(x)  # one population, or one candidate, each


def test_later_pixels_win_where_two_are_painted_or_moved_to_the_same_place() -> None:
    x = torch.zeros(1, 1, 2, 2)
    place = torch.ones(1, 1, 2, dtype=torch.long)
    out = paint(x, place, place, torch.tensor([0.3, 0.7]).view(1, 1, 2, 1))
    assert out[0, 0, 1, 1] == pytest.approx(0.7)
    source = torch.arange(4.0).view(1, 1, 2, 2) / 4
    moved = move_pixels(source, x, torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, -1]]))
    assert moved.flatten().tolist() == [0.5, 0, 0, 0]


def test_moving_pixels_is_the_plain_loop() -> None:
    rng = stream(3, "moves")
    source, base = torch.rand(2, 5, 3, 4, 6, generator=rng)
    origins = torch.randint(24, (5, 30), generator=rng)
    destinations = torch.randint(-1, 24, (5, 30), generator=rng)
    expected = base.flatten(2).clone()
    for b in range(5):
        for o, d in zip(origins[b].tolist(), destinations[b].tolist(), strict=True):
            if d >= 0:
                expected[b, :, d] = source.flatten(2)[b, :, o]
    moved = move_pixels(source, base, origins, destinations)
    assert torch.equal(moved, expected.view_as(base))


def test_windows_and_destinations_cover_the_whole_image() -> None:
    x = torch.rand(400, 1, 5, 7, generator=stream(1, "images"))
    streams = ImageStreams.of(stream(0, "test"), x, torch.zeros(400, dtype=torch.long))
    patches = StreamPatches(streams, 5, 7, (2, 4), (2, 10))
    origins, destinations = patches.draw(torch.arange(400))
    valid = destinations >= 0
    sizes = valid.sum(1)
    assert set(origins[valid].tolist()) == set(range(35))
    assert set(destinations[valid].tolist()) == set(range(35))
    assert sizes.min() == 4
    assert sizes.max() == 4 * 7


def test_trials_are_the_best_plus_a_scaled_difference_of_two_others() -> None:
    # members of the population differ in one gene each, so that a trial shows who made it
    size = 6
    x = torch.rand(50, 4, 2, 2, generator=stream(1, "images"))
    streams = ImageStreams.of(stream(0, "test"), x, torch.zeros(50, dtype=torch.long))
    proposals = StreamProposals(streams, size, 1, 4)
    population = (0.5 + 0.1 * torch.eye(size, dtype=torch.float64)).expand(50, -1, -1)
    steps = (proposals.trials(population, torch.arange(50)) - population[:, :1]) / 0.1
    (up, a), (down, b) = steps.max(2), steps.min(2)
    torch.testing.assert_close(up, -down)
    torch.testing.assert_close(up, up[:, :1].expand_as(up))  # one scale for an image
    assert ((up >= 0.5 - 1e-9) & (up < 1)).all()
    own = torch.arange(size)
    assert ((a != b) & (a != own) & (b != own)).all()
    for i in range(size):  # every other one takes part
        assert set(a[:, i].tolist()) == set(range(size)) - {i}


def test_more_generations_never_help_the_victim() -> None:
    net = small_network(0)
    x, y = labelled_images(net)
    few, many = (
        net(attacked(OnePixel(steps=s, popsize=20), net, x, y)).argmax(1) == y for s in (1, 8)
    )
    assert (many <= few).all()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (OnePixel, {"pixels": 0}),
        (OnePixel, {"popsize": 3}),
        (OnePixel, {"preset": PRESET, "steps": 20}),
        (Pixle, {"height": (3, 2)}),
        (Pixle, {"restarts": 0}),
    ],
)
def test_senseless_settings_are_refused(kind: type[Attack], settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        kind(**settings)


# ---- parity with TorchAttacks 3.5.1


def small_network(seed: int) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 36, 10),
    )  # fmt: skip
    rng = stream(seed, "net")
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=rng) * (2 / max(1, p[0].numel())) ** 0.5
    return net.double().eval()


def labelled_images(net: nn.Module, count: int = 10) -> tuple[Tensor, Tensor]:
    """Images with the network's own labels, two of them made wrong."""
    x = torch.rand(count, 3, 12, 12, dtype=torch.float64, generator=stream(6, "images"))
    y = net(x).argmax(1)
    y[::6] = (y[::6] + 1) % 10
    return x, y


def theirs(attack: torchattacks.attack.Attack, x: Tensor, y: Tensor) -> Tensor:
    """One image at a time, numpy's global stream set to the one that ours gives the image."""
    before, results = np.random.get_state(), []
    for i, state in enumerate(numpy_states(stream(0, "test"), x, y)):
        np.random.set_state(state.get_state())
        results.append(attack(x[i : i + 1], y[i : i + 1]))
    np.random.set_state(before)
    return torch.cat(results)


PAIRS = [
    (OnePixel(preset=PRESET), torchattacks.OnePixel, {}),
    (OnePixel(preset=PRESET, pixels=3), torchattacks.OnePixel, {"pixels": 3}),
    (Pixle(preset=PRESET), torchattacks.Pixle, {}),
]


@pytest.mark.parametrize(("attack", "their_class", "settings"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_presets_are_bit_for_bit_theirs(
    attack: Attack,
    their_class: type[torchattacks.attack.Attack],
    settings: dict[str, int],
    dtype: torch.dtype,
) -> None:
    net = small_network(0)
    x, y = labelled_images(net)
    net, x = net.to(dtype), x.to(dtype)
    ours = attacked(attack, net, x, y)
    assert torch.equal(ours, theirs(their_class(net, **settings), x, y))
    assert (net(ours).argmax(1) != y).sum() > 0


@pytest.mark.parametrize("attack", [OnePixel(preset=PRESET), Pixle(preset=PRESET)])
def test_asking_once_is_enough_on_a_deterministic_victim(attack: OnePixel | Pixle) -> None:
    net = small_network(0)
    x, y = labelled_images(net)
    once = type(attack)(preset=PRESET, recheck=False)
    assert torch.equal(attacked(once, net, x, y), attacked(attack, net, x, y))


class Recorded(nn.Module):
    """Answers the n-th call with the n-th member of a list, over and over."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([small_network(s) for s in range(3)])
        self.order, self.calls = [0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 0], 0

    def forward(self, x: Tensor) -> Tensor:
        member = self.members[self.order[self.calls % len(self.order)]]
        self.calls += 1
        return cast(Tensor, member(x))


@pytest.mark.parametrize(("attack", "their_class", "settings"), PAIRS)
def test_single_images_meet_the_recorded_members_in_their_order(
    attack: Attack, their_class: type[torchattacks.attack.Attack], settings: dict[str, int]
) -> None:
    x, y = labelled_images(small_network(0), count=4)
    for i in range(len(x)):
        victim, other = Recorded(), Recorded()
        one, label = x[i : i + 1], y[i : i + 1]
        expected = theirs(their_class(other, **settings), one, label)
        assert torch.equal(attacked(attack, victim, one, label), expected)
        assert victim.calls == other.calls


def test_the_library_cannot_move_the_last_column_and_ours_can() -> None:
    x, y = dark_images(count=40, height=4, width=4)
    published = attacked(Pixle(preset=PRESET), Deaf(), x, y)
    ours = attacked(Pixle(iterations=1), Deaf(), x, y)
    assert torch.equal(published[..., -1], x[..., -1])
    assert torch.equal(published[..., -1, :], x[..., -1, :])
    assert (ours[..., -1] != x[..., -1]).any()

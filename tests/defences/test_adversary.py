"""Examples for training: many members' examples are crafted few images at a time, to no effect."""

import pytest
import torch
from torch import Tensor, nn

from defence_tools import batch, ensemble
from redefense.attacks.gradient import PGD
from redefense.defences import base
from redefense.defences.base import GRAPHS, Adversary
from redefense.defences.red import RED
from redefense.rng import stream
from redefense.runtime.mesh import Mesh
from redefense.threat import Threat
from redefense.train.exchange import Shared


@pytest.mark.parametrize("num_members", [2, 5, 40])
def test_chunks_of_images_change_no_example(num_members: int) -> None:
    members, data = ensemble(num_members, "digits-cnn"), batch(9)
    victim = members.averaged()
    found = Adversary(eps=0.1, steps=2).craft(victim, data.x, data.y, rng := stream(5))
    whole = PGD(steps=2, step_size=0.25, keep_best=False, loss="cross_entropy")
    expected = whole.perturb(victim.eval(), data.x, data.y, Threat(eps=0.1), rng=(one := stream(5)))
    torch.testing.assert_close(found, expected.detach(), rtol=0.0, atol=1e-12)
    # and the next draw is that of one call, whatever the number of chunks
    assert torch.equal(rng.get_state(), one.get_state())


@pytest.mark.parametrize("num_members", [5, 7, 9])
def test_processes_with_unequal_shares_of_the_members_cut_a_batch_alike(
    num_members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batch(16)
    cuts: list[list[int]] = []

    def crafted(oracle: object, start: Tensor, x: Tensor, *_: object, **__: object) -> Tensor:
        cuts[-1].append(len(x))
        return x

    monkeypatch.setattr(base, "climb", crafted)
    for rank in range(2):
        members = ensemble(num_members, "digits-cnn")
        members.spread = Shared(Mesh(shape=(1, 2), rank=rank), num_members)
        cuts.append([])
        Adversary().craft(members.averaged(), data.x, data.y, stream(0))
    assert cuts[0] == cuts[1]


@pytest.mark.parametrize(
    ("preset", "num_members", "cuts"),
    [
        ("calibrated", 8, [8]),
        ("calibrated", 12, [5, 3]),
        ("printed", 4, [16]),
        ("printed", 8, [8, 8]),
    ],
)
def test_red_takes_as_many_images_as_fit_beside_its_second_derivative(
    preset: str, num_members: int, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def crafted(oracle: object, start: Tensor, x: Tensor, *_: object, **__: object) -> Tensor:
        sizes.append(len(x))
        return x

    monkeypatch.setattr(base, "climb", crafted)
    next(RED(preset=preset).loss(ensemble(num_members), batch(16), stream(0)))
    assert sizes == cuts


@pytest.mark.parametrize("num_members", [1, 3, 4, 12, 30])
def test_graphs_of_all_members_are_those_of_a_few(
    num_members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, data = ensemble(num_members), batch(8)
    sizes: list[int] = []
    forward = type(members.member(0)).forward

    def counting(self: nn.Module, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(self, x)  # type: ignore[no-any-return]  # torch modules return Any

    monkeypatch.setattr(type(members.member(0)), "forward", counting)
    Adversary(steps=1).craft(members.averaged(), data.x, data.y, stream(0))
    assert max(sizes) * num_members <= max(GRAPHS * len(data.x), num_members)
    assert sum(sizes) % (len(data.x) * num_members) == 0

"""Fork and snapshots: who trains when, what parts copies, and the subset attack in training."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defence_tools import assert_same, batch, engine_gradients, ensemble, gradients_of, identical
from redefense.attacks.adaptive import Support
from redefense.attacks.objectives import margin
from redefense.attacks.subset import ANY, Goal, subset_oracle
from redefense.config import OptimConfig
from redefense.defences import Adversary, Fork, Snapshots, fork
from redefense.defences.at import AdversarialTraining
from redefense.defences.fork import smooth_margin
from redefense.ensembles import Independent
from redefense.errors import ConfigError
from redefense.penalties import gradient_similarity
from redefense.rng import drawn, stream
from redefense.runtime.spread import SingleProcess
from redefense.train.loop import StepDone, fit
from redefense.types import Batch

WEAK = Adversary(eps=0.1, steps=2)


class Batches:
    """Two batches an epoch."""

    def __len__(self) -> int:
        return 2

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for _ in range(start_step, 2):
            yield batch()


def weights_of(members: Independent, m: int) -> Tensor:
    return torch.cat([p.detach().flatten() for p in members.parameters_of(m)])


def test_the_stages_share_the_epochs_and_one_schedule() -> None:
    one, copies = Fork(share=0.75).stages(3, 8)
    assert (one.epochs, one.members, one.schedule) == (6, (0,), (0.0, 0.75))
    assert (copies.epochs, copies.members, copies.schedule) == (2, (0, 1, 2), (0.75, 1.0))
    assert [s.epochs for s in Fork(share=0.99).stages(2, 3)] == [2, 1]
    with pytest.raises(ConfigError, match="at least 2 epochs, got 1"):
        Fork().stages(3, 1)
    with pytest.raises(ConfigError, match=r"share must lie in .0, 1., got 1.0"):
        Fork(share=1.0)


def test_the_learning_rate_goes_on_where_one_network_stopped() -> None:
    optim = OptimConfig(lr=0.1, schedule="cosine")
    events = fit(ensemble(2), Fork(adversary=WEAK, share=0.5).stages(2, 2), Batches(), optim=optim)
    found = [event.terms["lr"] for event in events if isinstance(event, StepDone)]
    plain = [
        event.terms["lr"]
        for event in fit(ensemble(1), AdversarialTraining(adversary=WEAK).stages(1, 2), Batches(),
                         optim=optim)
        if isinstance(event, StepDone)
    ]  # fmt: skip
    assert found == pytest.approx(plain, rel=1e-12)
    assert len(found) == 4


@pytest.mark.parametrize("apart", ["none", "similarity", "subset"])
def test_copies_start_as_the_network_and_part(apart: str) -> None:
    members = ensemble(3)
    one, copies = Fork(adversary=WEAK, apart=apart).stages(3, 2)  # type: ignore[arg-type]  # one of three
    assert one.before is not None
    assert copies.before is not None
    one.before(members)
    assert members.mixture.tolist() == [1.0, 0.0, 0.0]
    before = weights_of(members, 1)
    for _ in fit(members, [one], Batches(), optim=OptimConfig(lr=0.5)):
        pass
    assert torch.equal(weights_of(members, 1), before)
    copies.before(members)
    assert members.mixture.tolist() == [1 / 3] * 3
    assert torch.equal(weights_of(members, 1), weights_of(members, 0))
    for _ in fit(members, [copies], Batches(), optim=OptimConfig(lr=0.5)):
        pass
    for a, b in combinations(range(3), 2):
        assert not torch.equal(weights_of(members, a), weights_of(members, b))


def test_the_similarity_is_reds_at_each_members_own_examples() -> None:
    members, data = ensemble(3), batch()
    defence = Fork(adversary=WEAK, similarity=0.7)
    found, logged = engine_gradients(members, defence, data)
    own = WEAK.craft_own(members, data.x, data.y, stream(0))
    logged_similarity = []

    def joint() -> None:
        total, grads = torch.zeros((), dtype=torch.float64), []
        for m, x in enumerate(own):
            x = x.clone().requires_grad_()
            loss = F.cross_entropy(members.logits_of(m, x), data.y, reduction="sum")
            grads.append(torch.autograd.grad(loss, x, create_graph=True)[0].flatten(1))
            total = total + loss / len(x)
        similarity = gradient_similarity(torch.stack(grads))
        logged_similarity.append(float(similarity.detach()))
        (total + 0.7 * similarity).backward()

    assert_same(found, gradients_of(members, joint))
    assert logged["similarity"] == pytest.approx(logged_similarity[0], rel=1e-9)


def test_the_smooth_margin_is_what_the_subset_attack_climbs() -> None:
    members, data = ensemble(3), batch(8)
    logits = members.member_logits(data.x).transpose(0, 1)
    chosen = torch.rand(8, 3, generator=stream(3)) < 0.5
    chosen[:, 0] |= ~chosen.any(1)
    scale = logits.detach().std(2)
    support = Support(members)
    goal = Goal(chosen, torch.full((8, 3), ANY), scale)
    expected = subset_oracle(support, data.y, goal, 0.2)(data.x, False).value
    torch.testing.assert_close(smooth_margin(logits, data.y, chosen, 0.2), expected)
    sharp = smooth_margin(logits, data.y, chosen, 1e-6)
    gaps = torch.stack([margin(logits[:, m], data.y) / scale[:, m] for m in range(3)], 1)
    least = torch.where(chosen, gaps, torch.inf).amin(1)
    torch.testing.assert_close(sharp, least, rtol=0.0, atol=1e-5)


def test_members_learn_from_the_images_whose_subset_they_are_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, data = identical(2), batch(64)
    seen: list[Tensor] = []

    def noted(*args: Any) -> Tensor:
        seen.append(drawn(*args))
        return seen[-1]

    monkeypatch.setattr(fork, "drawn", noted)
    defence = Fork(adversary=Adversary(eps=0.0, steps=1), apart="subset")
    found, _ = engine_gradients(members, defence, data)
    (chosen,) = seen
    # of three nonempty subsets two hold a member
    assert chosen.any(1).all()
    assert float(chosen.double().mean()) == pytest.approx(2 / 3, abs=0.15)

    def expected() -> None:
        for m in range(2):
            rows = chosen[:, m]
            F.cross_entropy(members.logits_of(m, data.x[rows]), data.y[rows]).backward()

    assert_same(found, gradients_of(members, expected))


def test_rows_of_processes_have_parts_of_one_batch_of_subsets() -> None:
    members, data = identical(3), batch(16)
    defence = Fork(adversary=Adversary(eps=0.0, steps=1), apart="subset")

    def losses(rows: slice) -> list[Tensor]:
        class Part(SingleProcess):
            def rows(self, size: int) -> tuple[int, slice]:
                return 16, rows

        members.spread = Part()
        part = replace(data, x=data.x[rows], y=data.y[rows], index=data.index[rows])
        return [it.total.detach() for it in defence.loss(members, part, stream(0, "step"))]

    whole = losses(slice(None))
    parts = [losses(slice(0, 8)), losses(slice(8, 16))]
    torch.testing.assert_close(
        [torch.stack(pair).mean() for pair in zip(*parts, strict=True)], whole
    )


def test_snapshots_are_one_network_at_the_ends_of_its_cycles() -> None:
    members = ensemble(3)
    stages = Snapshots(adversary=WEAK).stages(3, 4)
    assert [(s.epochs, s.members, s.schedule) for s in stages] == [
        (2, (0,), (0.0, 1.0)), (1, (1,), (0.0, 1.0)), (1, (2,), (0.0, 1.0)),
    ]  # fmt: skip
    starts = []
    for m, stage in enumerate(stages):
        assert stage.before is not None
        stage.before(members)
        starts.append(weights_of(members, m))
        assert members.shares() == [1 / (m + 1)] * (m + 1) + [0.0] * (2 - m)
        for _ in fit(members, [stage], Batches(), optim=OptimConfig(lr=0.1)):
            pass
        if m < 2:
            ended = weights_of(members, m)
            assert not torch.equal(ended, starts[m])
            assert stages[m + 1].before is not None
            stages[m + 1].before(members)  # type: ignore[misc]  # asked above
            assert torch.equal(weights_of(members, m + 1), ended)

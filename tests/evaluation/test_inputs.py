"""Networks and data as people have them: functions, probabilities, arrays, data sets, loaders."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    SubsetRandomSampler,
    TensorDataset,
)

import redefense
from redefense.data import test_indices as permutation
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError, DataError, InputError
from redefense.evaluation.inputs.data import read_data
from redefense.evaluation.inputs.objects import suite_of
from redefense.evaluation.inputs.radii import read_radii
from redefense.networks import FromProbabilities, query
from redefense.rng import stream

IMAGES = torch.rand(30, 3, 6, 5, generator=stream(0, "images"))
LABELS = torch.arange(30) % 4


@dataclass
class Output:
    """What networks of other libraries return."""

    logits: Tensor
    loss: Tensor | None = None


class Linear(nn.Module):
    """A linear network whose answer is wrapped."""

    def __init__(self, wrap: Any = lambda z: z) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(90, 4, generator=stream(0, "weight")))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x.flatten(1) @ self.weight)


class Pairs(Dataset[Any]):
    """A data set that says which images were read."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.read = rows, list[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return self.rows[i]


def figures(model: Any, data: Any = (IMAGES, LABELS), **settings: Any) -> Any:
    settings = {"suite": [redefense.attacks.PGD(steps=3)], **settings}
    report = redefense.evaluate(model, data, threat=redefense.Threat(eps=0.05), **settings)
    return report.data["clean"], [cell["accuracy"] for cell in report.data["cells"]]


def test_functions_and_objects_with_logits_are_measured_as_the_network() -> None:
    network = Linear()
    expected = figures(network)
    assert figures(Linear(lambda z: Output(z))) == expected
    assert figures(lambda x: network(x)) == expected
    assert figures(partial(torch.func.functional_call, network, {})) == expected
    assert (
        figures([network, lambda x: network(x)])[0]["per_member"] == expected[0]["per_member"] * 2
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: (z,),
        lambda z: {"features": z},
        lambda z: Output(z[0]),
        lambda z: z + 0j,
        lambda z: z > 0,
    ],
    ids=["tuple", "mapping", "vector", "complex", "bool"],
)
def test_other_answers_are_refused(wrap: Any) -> None:
    with pytest.raises(InputError, match="logits"):
        figures(Linear(wrap))


def test_probabilities_are_taken_as_such_when_asked() -> None:
    plain, soft = Linear(lambda z: z / 20), Linear(lambda z: (z / 20).softmax(-1))
    logits = query(FromProbabilities(soft), IMAGES)
    torch.testing.assert_close(logits, plain(IMAGES).log_softmax(-1))
    assert figures(soft, outputs="probabilities") == figures(plain)
    with pytest.warns(redefense.RedCheckWarning, match="return probabilities"):
        redefense.evaluate(soft, (IMAGES, LABELS))
    with pytest.raises(ConfigError, match="logits or probabilities, got 'softmax'"):
        figures(soft, outputs="softmax")
    mixed = figures([soft, soft], outputs="probabilities", mixture=[0.25, 0.75])
    assert mixed[0]["expected"] == pytest.approx(figures(plain)[0]["expected"])
    for wrong in (
        plain,
        Linear(lambda z: z.log_softmax(-1)),
        Linear(lambda z: 100 * z.softmax(-1)),
    ):
        with pytest.raises(InputError, match=r"must lie in \[0, 1\], got values from"):
            figures(wrong, outputs="probabilities")
    with pytest.raises(ConfigError, match="got a Hidden"):
        figures(Hidden(plain), outputs="probabilities")


class Hidden(Ensemble):
    """An ensemble whose members' answers nobody else may wrap."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(1, None)
        self.network = network

    def member(self, m: int) -> nn.Module:
        return self.network


def test_integers_are_logits_without_a_gradient() -> None:
    whole = Linear(lambda z: (4 * z).long())
    assert torch.equal(query(whole, IMAGES), (4 * Linear()(IMAGES)).trunc())
    with pytest.warns(redefense.RedCheckWarning, match="S22"):
        redefense.evaluate(whole, (IMAGES, LABELS))


def test_an_unfinished_evaluation_of_one_function_is_not_gone_on_with_another(
    tmp_path: Path,
) -> None:
    network = Linear()
    figures(lambda x: network(x), out=tmp_path)
    with pytest.raises(ConfigError, match="answers"):
        figures(lambda x: -network(x), out=tmp_path)


def test_arrays_and_data_sets_are_read_as_their_tensors() -> None:
    chosen = permutation(30, 7)
    for given in (
        (IMAGES, LABELS),
        (IMAGES.numpy(), LABELS.numpy()),
        TensorDataset(IMAGES, LABELS),
        [IMAGES, LABELS.int()],
        (IMAGES, LABELS.tolist()),
        Pairs([(x.numpy(), int(y)) for x, y in zip(IMAGES, LABELS, strict=True)]),
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8),
    ):
        x, y, index = read_data(given)
        assert torch.equal(x, IMAGES)
        assert torch.equal(y, LABELS)
        assert index.tolist() == list(range(30))
        x, y, index = read_data(given, 7)
        assert torch.equal(x, IMAGES[chosen])
        assert torch.equal(y, LABELS[chosen])
        assert index.tolist() == chosen.tolist()


def test_radii_may_be_an_array_and_an_attack_is_no_suite() -> None:
    assert read_radii(np.array([0.1, 0.05])) == read_radii(
        torch.tensor([0.05, 0.1], dtype=torch.float64)
    )
    with pytest.raises(ConfigError, match=r"'pgd' is an attack and not a suite: use suite=\['pgd"):
        suite_of("pgd")


def test_of_a_data_set_only_the_chosen_images_are_read() -> None:
    pairs = Pairs(list(zip(IMAGES, LABELS, strict=True)))
    read_data(pairs, 7)
    assert pairs.read == permutation(30, 7).tolist()


def test_channels_that_come_last_in_arrays_are_turned_and_said() -> None:
    last = IMAGES.permute(0, 2, 3, 1)
    with pytest.warns(UserWarning, match=re.escape("(30, 6, 5, 3) are read as (B, H, W,")):
        assert torch.equal(read_data((last.numpy(), LABELS))[0], IMAGES)
    # of a tensor the order is a rule, and no guess
    with pytest.raises(InputError, match=re.escape("(30, 6, 5, 3), which looks like (B, H, W,")):
        read_data((last, LABELS))
    # the way out that the message names, for channels that do come first
    assert torch.equal(read_data((last.mT, LABELS))[0], last.mT)


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 8, 3), (3, 5, 1), (12, 100, 1), (1, 1, 1), (64, 4, 3), (16, 1, 1)]
)
def test_shapes_of_images_and_signals_are_read_as_channels_first(shape: tuple[int, ...]) -> None:
    x = torch.rand(3, *shape, generator=stream(0))
    assert torch.equal(read_data((x, LABELS[:3]))[0], x)


def test_an_array_is_not_shared_with_its_owner() -> None:
    array = IMAGES.numpy().copy()
    x = read_data((array, LABELS))[0]
    array[:] = 0
    assert torch.equal(x, IMAGES)


def test_what_cannot_be_read_is_one_line() -> None:
    ragged = [(IMAGES[0], 0), (IMAGES[1, :, 1:], 1)]
    for given, line in (
        (DataLoader(TensorDataset(IMAGES, LABELS), shuffle=True), "shuffle=False"),
        (DataLoader(TensorDataset(IMAGES, LABELS), sampler=SubsetRandomSampler([0, 1])), "shuffle"),
        (
            DataLoader(TensorDataset(IMAGES, LABELS), batch_size=len(IMAGES) - 1, drop_last=True),
            "drops its last 1 images: use drop_last=False",
        ),
        (DataLoader(TensorDataset(IMAGES)), "pairs|batches"),
        (Pairs(ragged), "equal sizes"),
        (Pairs([("cat.png", 0)]), "got str as the first image"),
        (Pairs([IMAGES[0]]), r"pairs \(image, label\)"),
        ((np.array(["cat"]), LABELS), "images must be a torch.Tensor, got ndarray"),
        (((255 * IMAGES).byte().numpy(), LABELS), "uint8 \\(bytes: divide them by 255\\)"),
        ((IMAGES, [[0], [0, 1]]), "labels must be a vector of integers, got list"),
        (IMAGES, "a torch Dataset with a length"),
    ):
        with pytest.raises(InputError, match=line):
            read_data(given)
    with pytest.raises(DataError, match="cannot be read: list index out of range"):
        read_data(Short(ragged))
    with pytest.raises(ConfigError, match=r"must lie in \[1, 30\]"):
        read_data((IMAGES, LABELS), 31)


class Short(Pairs):
    """A data set that promises more than it has."""

    def __len__(self) -> int:
        return len(self.rows) + 1

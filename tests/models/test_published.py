"""Published weights: names of other repositories find their place, and nothing of a file runs."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from redefense.errors import DataError
from redefense.models import build
from redefense.models.layers import Normalise
from redefense.models.published import fit, read_states
from redefense.rng import stream

DEPTHS = {"resnet20": [3, 3, 3], "resnet18": [2, 2, 2, 2]}


def network(name: str, seed: int = 0) -> nn.Module:
    return build(
        name, num_classes=4, shape=(3, 32, 32), width=4, generator=stream(0, "published", seed)
    )


def theirs(net: nn.Module, name: str, shortcut: str, classifier: str) -> dict[str, Tensor]:
    """The state of a network of ours by the names that other repositories use."""
    places = [(s, b) for s, depth in enumerate(DEPTHS[name], 1) for b in range(depth)]
    found = {}
    for key, value in net.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "blocks":
            number, _, inner = rest.partition(".")
            stage, block = places[int(number)]
            other = f"layer{stage}.{block}.{inner.replace('shortcut', shortcut)}"
        else:
            other = {"stem": "conv1", "stem_bn": "bn1", "classifier": classifier}.get(part, "")
            other += f".{rest}"
        if part != "normalise":
            found[other] = value
    return found


def assert_equal(net: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    assert [n for n, t in net.state_dict().items() if not torch.equal(t, expected[n])] == []


@pytest.mark.parametrize(
    ("name", "shortcut", "classifier"),
    [("resnet18", "downsample", "fc"), ("resnet20", "shortcut", "linear")],
)
@pytest.mark.parametrize("prefix", ["", "module.", "1.", "module.model."])
def test_names_of_other_repositories_find_their_place(
    name: str, shortcut: str, classifier: str, prefix: str, tmp_path: Path
) -> None:
    source, target = network(name), network(name, 1)
    state = theirs(source, name, shortcut, classifier)
    torch.save(
        {"state_dict": {prefix + k: t for k, t in state.items()}, "epoch": 3}, tmp_path / "net.pt"
    )
    (read,) = read_states(tmp_path / "net.pt")
    fitted = fit(target, read)
    assert (fitted.fresh, fitted.unused, fitted.normalised) == ((), (), False)
    for key, value in source.state_dict().items():
        if "num_batches" not in key:
            assert torch.equal(target.state_dict()[key], value)


def test_what_does_not_fit_stays_and_is_listed() -> None:
    source, target = network("resnet20"), network("resnet20", 1)
    before = target.state_dict()["classifier.weight"].clone()
    state = theirs(source, "resnet20", "shortcut", "linear")
    state["linear.weight"] = torch.zeros(1000, 16)
    state = {k: t for k, t in state.items() if "layer2.0.shortcut" not in k}
    fitted = fit(target, {**state, "temperature": torch.ones(1)})
    assert torch.equal(target.state_dict()["classifier.weight"], before)
    assert fitted.unused == ("linear.weight", "temperature")
    assert "classifier.weight" in fitted.fresh
    assert all(name == "classifier.weight" or "blocks.3.shortcut" in name for name in fitted.fresh)


@pytest.mark.parametrize("style", ["model_0", "model0.model", "models.0.1", "nested", "ours"])
def test_members_of_one_file_are_told_apart(style: str, tmp_path: Path) -> None:
    nets = [network("resnet20", m) for m in range(2)]
    states = [theirs(net, "resnet20", "shortcut", "linear") for net in nets]
    whole: Mapping[str, object]
    if style == "nested":
        whole = {f"model_{m}": state for m, state in enumerate(states)}
    elif style == "ours":
        states = [dict(net.state_dict()) for net in nets]
        whole = {f"members.{m}.{k}": t for m, state in enumerate(states) for k, t in state.items()}
    else:
        whole = {
            f"{style.replace('0', str(m), 1)}.{k}": t
            for m, state in enumerate(states)
            for k, t in state.items()
        }
    torch.save(whole, tmp_path / "members.pth")
    found = read_states(tmp_path / "members.pth")
    assert len(found) == 2
    for state, net in zip(found, nets, strict=True):
        target = network("resnet20", 9)
        assert fit(target, state).fresh == ()
        assert torch.equal(target.state_dict()["stem.weight"], net.state_dict()["stem.weight"])


MEAN, STD = torch.tensor([0.49, 0.48, 0.44]), torch.tensor([0.20, 0.19, 0.21])
PER_PIXEL = (3, 1, 1)


@pytest.mark.parametrize(
    ("prefix", "mean", "std", "shape"),
    [
        ("model.", "normalizer.mean", "normalizer.std", (3,)),  # advertorch's, in DVERGE
        ("module.model.", "module.normalizer.mean", "module.normalizer.std", (3,)),
        ("1.", "0.mean", "0.std", (3,)),
        ("", "mu", "sigma", (1, *PER_PIXEL)),  # RobustBench's
        ("module.", "module.mu", "module.sigma", PER_PIXEL),
    ],
)
def test_a_stored_normalisation_is_taken_over(
    prefix: str, mean: str, std: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    source, target = network("resnet20"), network("resnet20", 1)
    layer = source.normalise
    assert isinstance(layer, Normalise)
    layer.mean.copy_(MEAN)
    layer.std.copy_(STD)
    state = theirs(source, "resnet20", "downsample", "fc")
    torch.save(
        {**{prefix + k: t for k, t in state.items()}, mean: MEAN.view(shape), std: STD.view(shape)},
        tmp_path / "net.pt",
    )
    (read,) = read_states(tmp_path / "net.pt")
    fitted = fit(target, read)
    assert (fitted.fresh, fitted.unused, fitted.normalised) == ((), (), True)
    x = torch.rand(2, 3, 32, 32, generator=stream(0, "x"))
    assert torch.equal(target.eval()(x), source.eval()(x))


@pytest.mark.parametrize("std", [torch.ones(1), torch.tensor([0.2, 0.0, 0.2]), None])
def test_half_a_normalisation_is_none(std: Tensor | None) -> None:
    target = network("resnet20")
    before = {k: t.clone() for k, t in target.state_dict().items()}
    fitted = fit(target, {"mu": MEAN} | ({} if std is None else {"sigma": std}))
    assert not fitted.normalised
    assert fitted.unused == ("mu", "sigma")[: 1 + (std is not None)]
    assert all(torch.equal(before[k], t) for k, t in target.state_dict().items())


class Runs:
    """Would write a file if it were unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.place,)  # type: ignore[return-value]  # an argument is one


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol=2))
    torch.save({"net": network("resnet20"), "x": Runs(tmp_path / "ran")}, tmp_path / "bad.pth")
    for name in ("bad.pt", "bad.pth"):
        with pytest.raises(DataError, match="could run code"):
            read_states(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_files_without_a_network_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("weights")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "page.pt").write_text("(lp0\n.")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for name, says in (
        ("text.safetensors", "cannot read weights"), ("none.pt", "no tensors by"),
        ("table.csv", "table.csv"), ("page.pt", "page.pt"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says):
            read_states(tmp_path / name)
    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    assert [list(s) for s in read_states(tmp_path / "one.safetensors")] == [["conv1.weight"]]

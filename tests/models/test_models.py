"""Networks: counts and outputs against figures derived by other means, taps, initialisation."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.data import Loader, load_dataset, train_validation
from redefense.errors import ConfigError
from redefense.models import ACTIVATIONS, MODELS, Tapped, build
from redefense.rng import stream

GREY = ("linear", "mlp", "digits-cnn")


def shape_of(name: str) -> tuple[int, int, int]:
    if name in GREY:
        return 1, 8, 8
    return (3, 64, 64) if name.endswith("64") else (3, 32, 32)


def make(name: str, **changes: object) -> nn.Module:
    settings = {"num_classes": 10, "shape": shape_of(name), "generator": stream(0, "net")}
    return build(name, **(settings | changes)).eval()  # type: ignore[arg-type]  # mixed values


def images(name: str, count: int = 3) -> Tensor:
    return torch.rand(count, *shape_of(name), generator=stream(0, "images"))


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def cifar_count(n: int) -> int:
    """Parameters of a CIFAR ResNet of depth 6n + 2: He's published form plus two projections."""
    plain = 3 * 16 * 9 + (2 * n) * 16 * 16 * 9
    plain += 16 * 32 * 9 + (2 * n - 1) * 32 * 32 * 9 + 32 * 64 * 9 + (2 * n - 1) * 64 * 64 * 9
    norms = 2 * (16 * (2 * n + 1) + 32 * 2 * n + 64 * 2 * n)
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    return plain + norms + 64 * 10 + 10 + projections


@pytest.mark.parametrize(("name", "n"), [("resnet8", 1), ("resnet20", 3), ("resnet32", 5)])
def test_cifar_resnets_have_the_counted_parameters(name: str, n: int) -> None:
    assert num_parameters(make(name)) == cifar_count(n)


def test_published_parameter_counts() -> None:
    assert num_parameters(make("resnet18")) == 11_173_962
    # He et al.'s 0.27 M (269,722) and 0.85 M (853,018) with parameter-free shortcuts
    assert num_parameters(make("resnet20")) == 269_722 + 2_752
    assert num_parameters(make("resnet56")) == 853_018 + 2_752
    # torchvision's 11,689,512 at 1000 classes, 513 parameters a class
    assert num_parameters(make("resnet18-64", num_classes=200)) == 11_689_512 - 800 * 513


def functional_resnet18(state: dict[str, Tensor], x: Tensor, *, large: bool) -> Tensor:
    """ResNet-18 written out from its definition, reading the weights by name."""

    def norm(x: Tensor, at: str) -> Tensor:
        shape = (1, -1, 1, 1)
        mean, var = state[f"{at}.running_mean"], state[f"{at}.running_var"]
        scale = state[f"{at}.weight"] / (var + 1e-5).sqrt()
        return (x - mean.view(shape)) * scale.view(shape) + state[f"{at}.bias"].view(shape)

    x = (x - state["normalise.mean"].view(1, -1, 1, 1)) / state["normalise.std"].view(1, -1, 1, 1)
    x = F.conv2d(x, state["stem.weight"], stride=2 if large else 1, padding=3 if large else 1)
    x = norm(x, "stem_bn").clamp_min(0)
    if large:
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for number in range(8):
        at, stride = f"blocks.{number}", 2 if number in (2, 4, 6) else 1
        y = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(norm(y, f"{at}.bn1").clamp_min(0), state[f"{at}.conv2.weight"], padding=1)
        if stride == 2:
            x = norm(F.conv2d(x, state[f"{at}.shortcut.0.weight"], stride=2), f"{at}.shortcut.1")
        x = (norm(y, f"{at}.bn2") + x).clamp_min(0)
    features = x.flatten(2).mean(2)
    return features @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("name", ["resnet18", "resnet18-64"])
def test_resnet18_equals_its_definition(name: str) -> None:
    net = make(name, width=8, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4]).double()
    rng = stream(0, "statistics")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                assert isinstance(values, Tensor)
                values.data.uniform_(0.5, 1.5, generator=rng)
    x = images(name).double()
    expected = functional_resnet18(net.state_dict(), x, large=name.endswith("64"))
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_taps_name_the_values_inside_the_network(name: str) -> None:
    net, x = make(name, width=4), images(name)
    assert isinstance(net, Tapped)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    seen: list[Tensor] = []
    handles = [m.register_forward_hook(lambda *args: seen.append(args[2])) for m in norms]
    logits = net(x)
    for handle in handles:
        handle.remove()
    taps = [net.tap(x, tap) for tap in net.tap_names]
    assert net.tap_names[-1] == "logits"
    torch.testing.assert_close(taps[-1], logits)
    if name.startswith("resnet"):
        blocks = (len(net.tap_names) - 2) // 2
        assert len(taps) == 2 * blocks + 2  # stem, two a block, logits
        torch.testing.assert_close(taps[0], seen[0])
        torch.testing.assert_close(taps[1], seen[1])
        into_block = net.pool(taps[0].clamp_min(0))  # type: ignore[operator]  # a module
        torch.testing.assert_close(taps[2], seen[2] + into_block)
    with pytest.raises(ValueError, match="not in tuple"):
        net.tap(x, "nowhere")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_equal_generators_give_equal_networks_and_nothing_else_is_drawn(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again = make(name), make(name)
    other = make(name, generator=stream(1, "net"))
    assert torch.equal(before, torch.random.get_rng_state())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first(images(name)), other(images(name)))


def test_convolutions_have_he_variance_by_fan_out() -> None:
    net = make("resnet18")
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


def test_normalisation_is_the_first_layer() -> None:
    net = make("linear", mean=[0.2], std=[0.1])
    plain = make("linear", mean=[0.0], std=[1.0])
    x = images("linear")
    torch.testing.assert_close(net(x), plain((x - 0.2) / 0.1))


def test_leaky_units_have_slope_a_tenth() -> None:
    assert ACTIVATIONS["leaky"](torch.tensor([-1.0, 2.0])).tolist() == pytest.approx([-0.1, 2.0])
    leaky = make("resnet8", activation="leaky")
    assert leaky.activation_name == "leaky"
    assert not torch.equal(leaky(images("resnet8")), make("resnet8")(images("resnet8")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet9"}, "unknown model 'resnet9'"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"mean": [0.5]}, "must be 3 numbers each"),
        ({"std": [0.5, 0.5, 0.0]}, "std positive"),
        ({"num_classes": 0}, "must be positive"),
        ({"width": 0}, "must be positive"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**({"name": "resnet8"} | changes))  # type: ignore[arg-type]  # mixed values


def stand_in_for_timm(create: Callable[..., nn.Module]) -> ModuleType:
    module = ModuleType("timm")
    module.create_model = create  # type: ignore[attr-defined]  # a stand-in
    return module


def test_timm_networks_are_built_from_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, *, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
        assert not pretrained
        if name != "net":
            raise RuntimeError("Unknown model (other)")
        last = nn.Linear(in_chans * 4, num_classes)
        # some networks initialise themselves by numpy or Python
        nn.init.constant_(last.bias, np.random.rand() + random.random())
        return nn.Sequential(nn.Flatten(), last)

    monkeypatch.setitem(sys.modules, "timm", stand_in_for_timm(create))
    # beartype draws from Python's generator in tests, so that its state is not compared
    before, of_numpy = torch.random.get_rng_state(), str(np.random.get_state())
    nets = [make("timm:net", shape=(3, 2, 2), generator=stream(0, "net")) for _ in range(2)]
    x = torch.full((1, 3, 2, 2), 0.5)
    assert torch.equal(nets[0](x), nets[1](x))
    assert nets[0](x).shape == (1, 10)
    assert torch.equal(before, torch.random.get_rng_state())
    assert str(np.random.get_state()) == of_numpy
    with pytest.raises(ConfigError, match="Unknown model"):
        make("timm:other", shape=(3, 2, 2))
    with pytest.raises(ConfigError, match="its own width"):
        make("timm:net", shape=(3, 2, 2), width=8)


def test_a_missing_timm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        make("timm:resnet18", shape=(3, 32, 32))


def test_the_digits_network_learns_the_digits_in_seconds() -> None:
    train, validation, _ = train_validation(load_dataset("digits"))
    net = make("digits-cnn").train()
    loader = Loader(train, batch_size=64, seed=0, augment=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(8):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(batch.x), batch.y).backward()
            optimizer.step()
    predicted = net.eval()(validation.float()).argmax(1)
    assert (predicted == validation.labels).float().mean().item() > 0.97


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import no_such_package", "needs no_such_package: pip install no_such_package"),
        ("raise RuntimeError('no operator nms')", "timm cannot be imported: no operator nms"),
    ],
)
def test_a_timm_that_cannot_be_imported_is_one_line(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ConfigError, match=says):
        build("timm:vit", num_classes=2, shape=(3, 8, 8), generator=stream(0))

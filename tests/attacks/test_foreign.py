"""Attacks of other libraries and plain functions, judged as our own."""

import random
import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense import Threat, evaluate
from redefense.attacks import FGSM, foreign
from redefense.ensembles import Independent
from redefense.errors import ConfigError, InputError
from redefense.rng import stream

X = torch.rand(12, 3, 6, 6, generator=stream(0, "x"))
THREAT = Threat(eps=0.05)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(6 * 16, 4)).eval()


NET = network(0)
Y = NET(X).argmax(1)


def call(function: Any, model: nn.Module = NET, x: Tensor = X) -> Tensor:
    return foreign(function, "mine")()(model, x, Y, THREAT, rng=stream(0, "rng"))


def of_torchattacks(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    import torchattacks

    found: Tensor = torchattacks.FGSM(model, eps=eps)(x, y)
    return found


def of_foolbox(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    import foolbox

    attack: Any = foolbox.attacks.fast_gradient_method.LinfFastGradientAttack(random_start=False)
    of: Any = foolbox.models.pytorch.PyTorchModel
    _, x_adv, _ = attack(of(model, bounds=(0, 1)), x, y, epsilons=eps)
    found: Tensor = x_adv
    return found


@pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")
@pytest.mark.parametrize("function", [of_torchattacks, of_foolbox])
def test_one_step_of_another_library_is_ours_on_every_view(function: Any) -> None:
    ensemble = Independent([network(0), network(1)]).eval()
    for view in (ensemble.averaged(), ensemble.member(1)):
        ours = FGSM()(view, X, Y, THREAT, rng=stream(0, "rng"))
        assert torch.allclose(call(function, view), ours, atol=1e-6, rtol=0)


def test_a_function_finds_views_in_the_mode_of_their_members_and_may_leave_another() -> None:
    seen, ensemble = [], Independent([network(0), network(1)]).eval()

    def switching(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(any(part.training for part in model.modules()))
        model.train()  # as libraries do that restore the mode of a view in training mode
        return x

    report = evaluate(ensemble, (X, Y), [switching])
    assert seen == [False]
    assert not any(part.training for part in ensemble.modules())
    cell = report.data["cells"][0]["accuracy"]
    assert cell["expected"] == report.data["clean"]["expected"]


def test_a_function_may_view_print_draw_and_write_and_nothing_of_it_remains(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def untidy(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        print("step 1")  # noqa: T201
        x.view(len(x), -1)
        x += 0.01 * random.random() * np.random.rand()
        return x.clamp(0, 1).numpy()[..., ::-1]

    before, state = X.clone(), str(np.random.get_state())
    first = call(untidy)
    random.random()
    assert torch.equal(call(untidy, x=X.contiguous(memory_format=torch.channels_last)), first)
    assert str(np.random.get_state()) == state
    assert torch.equal(X, before)
    assert not torch.equal(first, X)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda model, x, y, eps: x[0, 7], r"failed when called with \(model, x, y, eps\): IndexE"),
        (
            lambda model, x, y: (x, [x], None),
            "a tuple of 3: a tensor of shape .*, a list of 1: a t",
        ),
        (lambda model, x, y: None, "got a NoneType"),
        (lambda model, x, y: (255 * x).byte(), "floating-point .* and torch.uint8"),
        (lambda model, x, y: x.numpy().astype(object), "an array of shape .* and object"),
    ],
    ids=["fails", "tuple", "none", "bytes", "objects"],
)
def test_what_a_function_does_wrong_is_one_line(function: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        call(function)
    assert "\n" not in str(caught.value)


def test_what_could_never_be_called_or_has_its_own_model_is_refused_at_once() -> None:
    import torchattacks

    def needs_epsilons(model: nn.Module, x: Tensor, y: Tensor, *, epsilons: float) -> Tensor:
        return x

    with pytest.raises(ConfigError, match="missing a required argument: 'epsilons'"):
        foreign(needs_epsilons)
    with pytest.raises(ConfigError, match="created for a model of its own"):
        foreign(torchattacks.PGD(NET))
    with pytest.raises(ConfigError, match="wrap it in a function"):
        evaluate(NET, (X, Y), [torchattacks.PGD])


def test_a_step_outside_the_ball_is_said_and_judged_inside() -> None:
    def far(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        return (x + 0.5 * grad.sign()).clamp(0, 1)

    with pytest.warns(UserWarning, match="far left the ball on 12 images"):
        report = evaluate(NET, (X, Y), [far], threat=THREAT, keep_images=True)
    identity = report.data["cells"][0]["id"]
    assert float((report.adversarial(identity) - X).abs().max()) <= THREAT.eps + 1e-6


@pytest.fixture
def adv_lib(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its attacks, without two packages that it imports for plots and for a perceptual distance."""
    pretrained = ModuleType("torchvision")
    pretrained.models = None  # type: ignore[attr-defined]  # what is imported from it
    monkeypatch.setitem(sys.modules, "torchvision", pretrained)
    monkeypatch.setitem(sys.modules, "visdom", ModuleType("visdom"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of distutils, at its import
        return import_module("adv_lib.attacks")


@pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")
def test_attacks_of_three_libraries_are_cells_that_are_judged(adv_lib: Any) -> None:
    threat = Threat(eps=0.02)

    def of_adv_lib(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        found: Tensor = adv_lib.pgd_linf(
            model, x, y, eps, steps=2, random_init=False, absolute_step_size=eps
        )
        return found

    def minimal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = adv_lib.ddn(model, x, y, steps=30)
        return found

    cells = {"torchattacks": of_torchattacks, "foolbox": of_foolbox, "adv-lib": of_adv_lib,
             "ddn": minimal}  # fmt: skip
    with pytest.warns(UserWarning, match="ddn left the ball on"):
        report = evaluate(NET, (X, Y), cells, threat=threat, keep_images=True)
    ours = FGSM()(NET, X, Y, threat, rng=stream(0, "rng"))
    fooled = NET(ours).argmax(1) != Y
    assert 0 < int(fooled.sum()) < len(Y)
    for name in ("torchattacks", "foolbox"):
        assert torch.allclose(report.adversarial(name), ours, atol=1e-6, rtol=0)
    # adv-lib returns an image unchanged that it does not fool
    changed = torch.where(fooled[:, None, None, None], ours, X)
    assert torch.allclose(report.adversarial("adv-lib"), changed, atol=1e-6, rtol=0)
    rows = {row["label"]: row for row in report.data["cells"]}
    left = float((~fooled).double().mean())
    found = [rows[name]["accuracy"]["expected"] for name in list(cells)[:3]]
    assert found == pytest.approx([left] * 3)
    assert [name for name in cells if "outside" in rows[name]] == ["ddn"]
    assert float((report.adversarial("ddn") - X).abs().max()) <= threat.eps + 1e-6

"""Networks as people have them: whatever they raise or write, figures or one line come out."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import redefense
from redefense.attacks import ATTACKS
from redefense.defences import DEFENCES, Stage
from redefense.ensembles import Independent, evaluating
from redefense.errors import ConfigError, InputError, ModelError, RedefenseError, ResourceError
from redefense.export import About, export, runner
from redefense.hub import to_robustbench
from redefense.networks import copied, mode_of, query, unwrapped
from redefense.report.landscape import surface
from redefense.rng import stream
from redefense.train import loop as fit
from redefense.types import Batch

IMAGES = torch.rand(12, 1, 4, 4, generator=stream(0, "images")).mul(16).round().div(16)
LABELS = torch.arange(12) % 3
THREAT = redefense.Threat(eps=0.1)


class Linear(nn.Module):
    """A linear network; images pass through a function on their way in."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, generator=stream(seed, "weight")))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x).flatten(1) @ self.weight


class Unusual(Exception):  # noqa: N818 - an error of somebody else's
    pass


class Wordless(Exception):  # noqa: N818 - an error of somebody else's
    def __str__(self) -> str:
        raise Unusual


def raising(error: BaseException) -> Callable[[Tensor], Tensor]:
    def refuse(x: Tensor) -> Tensor:
        raise error

    return refuse


def on_the_grid(x: Tensor) -> Tensor:
    """Takes the given images, and none that an attack has moved."""
    assert torch.equal(x * 16, (x * 16).round())
    return x


def by_twelve(x: Tensor) -> Tensor:
    """Takes one image or all, as a network that was exported for some batch sizes."""
    assert len(x) != 12, "batch must not be 12"
    return x


def attack(name: str, victim: nn.Module, **settings: Any) -> Tensor:
    return ATTACKS[name](**settings)(victim, IMAGES, LABELS, THREAT, rng=stream(0))


ENTRANCES: dict[str, Callable[[nn.Module], object]] = {
    "evaluate": lambda net: redefense.evaluate(net, (IMAGES, LABELS), threat=THREAT),
    "evaluate a list": lambda net: redefense.evaluate([Linear(), net], (IMAGES, LABELS)),
    "an attack": lambda net: attack("pgd", net),
    "an adaptive attack": lambda net: attack("hinge", net),
    "an attack without gradients": lambda net: attack("square", net, queries=5),
    "an ensemble's call": lambda net: Independent([net])(IMAGES),
    "a view's call": lambda net: Independent([net]).averaged()(IMAGES),
    "RobustBench's contract": lambda net: to_robustbench(net, IMAGES),
    "the landscape": lambda net: surface(
        Independent([net, net]), IMAGES[:1], LABELS[:1], radius=0.1
    ),
    "a training loss": lambda net: list(
        DEFENCES["red"]().loss(Independent([net]), Batch(IMAGES, LABELS, LABELS), stream(0))
    ),
    "examples of one's own": lambda net: list(
        DEFENCES["at"](variant="independent").loss(  # type: ignore[call-arg]  # the mapping knows defences alone
            Independent([net]), Batch(IMAGES, LABELS, LABELS), stream(0)
        )
    ),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("mat1 and mat2\nmore"), r"\(1, 4, 4\) in a batch of \d+: mat1 and mat2$"),
        (AssertionError(), r": AssertionError$"),
        (AssertionError("Wrong height"), r": Wrong height$"),
        (TypeError("got a tuple"), r": TypeError: got a tuple$"),
        (KeyError("stem"), r": KeyError: 'stem'$"),
        (NotImplementedError(), r": NotImplementedError$"),
        (Wordless(), r": Wordless$"),
        (Unusual("not today"), r": Unusual: not today$"),
        *(
            (kind("what"), rf": {kind.__name__}: what$")
            for kind in (IndexError, AttributeError, ZeroDivisionError, StopIteration, OSError)
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_whatever_a_network_raises_is_one_line(entrance: str, error: Exception, says: str) -> None:
    with pytest.raises(ModelError, match=f"^the model cannot take images of .*{says}") as caught:
        ENTRANCES[entrance](Linear(raising(error)))
    assert caught.value.code == 3
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_interrupts_pass_and_memory_has_a_line_of_its_own(entrance: str) -> None:
    for stop in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(stop)):
            ENTRANCES[entrance](Linear(raising(stop)))
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        with pytest.raises(ResourceError, match=r"^memory does not suffice.*fewer or smaller"):
            ENTRANCES[entrance](Linear(raising(error)))


@pytest.mark.parametrize("change", [on_the_grid, by_twelve])
@pytest.mark.parametrize("entrance", ["evaluate", "an attack", "an adaptive attack"])
def test_a_network_may_refuse_only_what_comes_later(
    entrance: str, change: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(InputError, match="cannot take images"):
        ENTRANCES[entrance](Linear(change))


class Odd(torch.autograd.Function):
    """Has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise Unusual("no derivative of this")


class Once(torch.autograd.Function):
    """The square, which has a first derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0].mul(2 * x)


@pytest.mark.parametrize("name", ["evaluate", "an attack", "an adaptive attack", "the landscape"])
def test_what_fails_in_the_backward_pass_is_one_line(name: str) -> None:
    says = r"^the model cannot be differentiated: Unusual: no derivative of this$"
    with pytest.raises(InputError, match=says):
        ENTRANCES[name](Linear(Odd.apply))


def test_weights_that_were_made_in_inference_mode_are_one_line() -> None:
    with torch.inference_mode():
        network = Linear()
    with pytest.raises(InputError, match=r"^the model cannot .*Inference tensors"):
        ENTRANCES["evaluate"](network)


def gradients(
    ensemble: Independent, *, name: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> list[Tensor]:
    """Of all weights, after one batch of a method's loss, as the training loop computes them."""
    batch, params = Batch(IMAGES.to(dtype), LABELS, torch.arange(12)), list(ensemble.parameters())
    members = tuple(range(ensemble.num_members))
    stage = Stage(name="test", epochs=1, members=members, loss=DEFENCES[name](**settings).loss)
    fit.gradients(ensemble, stage, params, "fp32", batch, stream(0))
    return [p.grad for p in params if p.grad is not None]


def test_a_missing_second_derivative_is_one_line_with_the_way_out() -> None:
    ensemble = Independent([Linear(Once.apply), Linear(Once.apply, seed=1)])
    for name in ("red", "gal", "trs"):
        with pytest.raises(
            InputError, match=r"twice.*: train red or gal with differentiate=finite"
        ):
            gradients(ensemble, name=name)
    assert all(
        bool(g.isfinite().all()) for g in gradients(ensemble, name="red", differentiate="finite")
    )


class Attention(nn.Module):
    """One head over rows of pixels, by torch's function or written out."""

    def __init__(self, seed: int, *, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(4, 12, generator=stream(seed, "qkv")))
        self.out = nn.Parameter(torch.randn(16, 3, generator=stream(seed, "out")))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ self.qkv).chunk(3, -1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return mixed.flatten(1) @ self.out


@pytest.mark.parametrize("name", ["red", "gal", "trs"])
def test_fused_attention_is_trained_as_if_it_were_written_out(name: str) -> None:
    fused, plain = (
        gradients(
            Independent([Attention(s, fused=f).double() for s in (0, 1)]),
            name=name,
            dtype=torch.float64,
        )
        for f in (True, False)
    )
    torch.testing.assert_close(fused, plain)


WRITERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "normalised": (lambda x: x.sub_(0.5).div_(0.5), lambda x: (x - 0.5) / 0.5),
    "clamped": (lambda x: x.clamp_(0.25, 0.75), lambda x: x.clamp(0.25, 0.75)),
    "beside the graph": (
        lambda x: (x.detach().mul_(0.5), x)[1], lambda x: 0.5 * x.detach() + (x - x.detach()),
    ),
    "through data": (
        lambda x: (x.data.mul_(0.5), x)[1], lambda x: 0.5 * x.detach() + (x - x.detach()),
    ),
    "without a graph alone": (lambda x: x if torch.is_grad_enabled() else x.mul_(2), lambda x: x),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_network_that_writes_into_its_input_is_measured_as_its_twin(name: str) -> None:
    given = IMAGES.clone()
    writer, twin = (Linear(change) for change in WRITERS[name])
    if name == "without a graph alone":  # which changes no label of a linear network
        twin = Linear(lambda x: x if torch.is_grad_enabled() else 2 * x)
    reports = [
        redefense.evaluate([net, Linear(seed=1)], (IMAGES, LABELS), threat=THREAT).data
        for net in (writer, twin)
    ]
    assert reports[0]["headline"] == reports[1]["headline"]
    accuracies = [[cell["accuracy"] for cell in report["cells"]] for report in reports]
    assert accuracies[0] == accuracies[1]
    for attacker, settings in (
        ("fgsm", {}), ("pgd", {}), ("cw", {"steps": 3}), ("deepfool", {}), ("apgd", {"steps": 5}),
        ("square", {"queries": 9}), ("hinge", {}), ("fab", {"steps": 3}), ("pixle", {}),
    ):  # fmt: skip
        moved = [attack(attacker, net, **settings) for net in (writer, twin)]
        assert torch.equal(*moved), attacker
    assert torch.equal(given, IMAGES)


def test_a_writer_is_trained_as_its_twin() -> None:
    writer, twin = (
        Independent([Linear(change), Linear(change, seed=1)]) for change in WRITERS["normalised"]
    )
    given = IMAGES.clone()
    for name in ("vanilla", "red", "trs", "at"):
        assert all(map(torch.equal, gradients(writer, name=name), gradients(twin, name=name)))
    assert torch.equal(given, IMAGES)


def convolution() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()  # fmt: skip


def exported(net: nn.Module) -> nn.Module:
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(net, (IMAGES[:4],), dynamic_shapes=(batch,)).module()


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        exported,
        lambda net: torch.jit.freeze(torch.jit.script(net)),
        lambda net: nn.Sequential(nn.Identity(), exported(net)),
        lambda net: net.requires_grad_(False),
        nn.DataParallel,
    ],
    ids=["exported", "frozen", "exported within", "no gradients", "parallel"],
)
def test_networks_that_cannot_change_their_mode_are_measured(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    net = wrap(convolution())
    modes = [bool(mode_of(child)) for child in net.modules()]
    headlines = [
        redefense.evaluate(model, (IMAGES, LABELS), threat=THREAT).headline
        for model in (net, convolution())
    ]
    assert headlines[0] == headlines[1]
    with evaluating(net):
        pass
    assert [bool(mode_of(child)) for child in net.modules()] == modes


def compiled_within() -> nn.Module:
    net = nn.Sequential(nn.Identity(), convolution())
    net[1] = torch.compile(net[1], backend="eager")  # type: ignore[assignment]  # a module for a module
    return net


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(16, 3))


class Keeps(nn.Module):
    """Keeps what it has computed, as networks do that are looked into."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.kept = network, {"all": [torch.zeros(())]}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["all"].append(self.network(x))
        return self.kept["all"][-1]


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: normed(nn.utils.weight_norm),
        lambda: normed(nn.utils.spectral_norm),
        lambda: normed(nn.utils.parametrizations.weight_norm),
        lambda: normed(nn.utils.parametrizations.spectral_norm),
        lambda: Keeps(convolution()),
        lambda: nn.DataParallel(convolution()),
        lambda: torch.compile(nn.DataParallel(convolution()), backend="eager"),
        compiled_within,
        lambda: Flexible(convolution()),
        lambda: Before(lambda x: x.sub_(0.5)),
        lambda: After(lambda z: SimpleNamespace(logits=z)),
        lambda: After(lambda z: z.double()),
    ],
    ids=[
        "weight norm", "spectral norm", "weight norm, new", "spectral norm, new", "keeps tensors",
        "parallel", "compiled and parallel", "compiled within", "any arguments", "writes",
        "object with logits", "double logits",
    ],
)  # fmt: skip
def test_a_bundle_of_a_network_as_people_have_it_answers_as_the_network(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    net = make()
    F.cross_entropy(query(net, IMAGES), LABELS).backward()  # the last step of a training
    net.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    about = About(shape=(1, 4, 4), classes=["a", "b", "c"])
    bundle = runner.open_bundle(export(Independent([net]), tmp_path / "bundle", about))
    answers = torch.from_numpy(runner.logits_of(bundle.open(0), IMAGES.numpy()))
    with torch.no_grad():
        torch.testing.assert_close(answers, query(net, IMAGES))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


class Flexible(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *images: Tensor) -> Any:
        return self.network(*images)


class After(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.change = convolution(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.network(x))


class Before(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.change = convolution(), change

    def forward(self, x: Tensor) -> Any:
        return self.network(self.change(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    locked = convolution()
    locked.lock = threading.Lock()  # type: ignore[assignment]  # what no copy can hold
    for net, kind, says in (
        (Before(raising(KeyError("stem"))), InputError, r"in a batch of 64: KeyError: 'stem'$"),
        (Before(lambda x: x if len(x) == 4 else raising(Unusual())(x)), InputError, "Unusual$"),
        (Before(lambda x: x if bool(x.sum() > 0) else -x), ConfigError, "cannot be exported: "),
        (torch.jit.script(convolution()), ConfigError, "give the network it was made from$"),
        (convolution().to("meta"), InputError, "weight members.0.0.weight has no values"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), InputError, "members.0.1.weight has no"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), ConfigError, r"shape \(64, 2\)"),
        (After(lambda z: z - z.mean(0)), InputError, "depends on the other images in its batch"),
        (Before(lambda x: x.reshape(len(x), 1, 4, 4)), ConfigError, r"x.shape\[0\], not from len"),
        (locked, InputError, "cannot be copied, which is needed here: cannot pickle"),
    ):
        about = About(shape=(1, 4, 4), classes=["a", "b", "c"])
        with pytest.raises(kind, match=says) as caught:
            export(Independent([net.eval()]), tmp_path / "bundle", about)
        assert isinstance(caught.value, RedefenseError)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_active_dropout_is_not_switched_off_by_an_export(tmp_path: Path) -> None:
    active = nn.Sequential(convolution(), nn.Dropout(0.5))
    about = About(shape=(1, 4, 4), classes=["a", "b", "c"])
    with pytest.raises(InputError, match=r"training mode \(active layers: Dropout\)"):
        export(Independent([convolution(), active]), tmp_path / "bundle", about)
    assert active[1].training
    assert not list(tmp_path.iterdir())


def test_a_copy_shares_nothing_and_wrappers_are_taken_off_at_every_depth() -> None:
    net = Keeps(nn.Sequential(nn.DataParallel(nn.DataParallel(convolution()))))
    net(IMAGES)
    plain = unwrapped(copied(net))
    assert not any(isinstance(part, nn.DataParallel) for part in plain.modules())
    assert {p.data_ptr() for p in plain.parameters()}.isdisjoint(
        p.data_ptr() for p in net.parameters()
    )
    assert torch.equal(plain(IMAGES), net(IMAGES))

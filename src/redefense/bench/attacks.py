"""Strength, cost and speed of the attacks, compared with TorchAttacks in one process.

Two tables. The first attacks one network with the default, the preset and the library: robust
accuracy, passes per image, seconds. The second attacks a random ensemble, with the presets on the
view that draws a member per call and with adaptive attacks. The difference is the overestimate of a
naive evaluation.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS, Attack
from redefense.attacks.base import TORCHATTACKS
from redefense.attacks.pixels import OnePixel
from redefense.attacks.pixle import Pixle
from redefense.bench.attack_tables import HOW_TO_INSTALL, LIBRARY, random_line, single_line
from redefense.config import OptimConfig
from redefense.data import Dataset, Split, load_dataset, train_validation
from redefense.data.loader import Loader
from redefense.defences.vanilla import Vanilla
from redefense.ensembles import Independent
from redefense.errors import ConfigError
from redefense.evaluation.pass_counter import Meter, Metered
from redefense.limits import at_least
from redefense.models import build
from redefense.results.intervals import paired_difference
from redefense.rng import seeded, stream
from redefense.runtime.device import computing
from redefense.threat import Threat
from redefense.train.loop import fit
from redefense.types import Images, Labels, correct

MEMBERS: Final = 4
HELD_OUT: Final = 0.2
"""Fraction of the training images held out from training and attacked."""

# with larger budgets the accuracy of undefended networks is zero under all attacks
EPS: Final[Mapping[str, float]] = MappingProxyType({"digits": 0.1, "cifar10": 2 / 255})
OPTIM: Final = OptimConfig(name="sgd", lr=0.15, weight_decay=5e-4, schedule="one-cycle")
EPOCHS: Final[Mapping[str, int]] = MappingProxyType({"digits": 12, "cifar10": 1})

Theirs = Callable[[ModuleType, nn.Module, float, int], Any]

THEIRS: Final[Mapping[str, Theirs]] = MappingProxyType(
    {
        "fgsm": lambda ta, net, eps, _: ta.FGSM(net, eps=eps),
        # alpha = eps / 4: the library's default step, 2/255, at its default eps of 8/255
        "bim": lambda ta, net, eps, _: ta.BIM(net, eps=eps, alpha=eps / 4),
        "mim": lambda ta, net, eps, _: ta.MIFGSM(net, eps=eps, alpha=eps / 4),
        "pgd": lambda ta, net, eps, _: ta.PGD(net, eps=eps, alpha=eps / 4),
        "di2fgsm": lambda ta, net, eps, _: ta.DIFGSM(net, eps=eps, alpha=eps / 4),
        "eotpgd": lambda ta, net, eps, _: ta.EOTPGD(net, eps=eps, alpha=eps / 4),
        "apgd": lambda ta, net, eps, _: ta.APGD(net, eps=eps),
        "apgdt": lambda ta, net, eps, k: ta.APGDT(net, eps=eps, n_classes=k),
        "fab": lambda ta, net, eps, k: ta.FAB(net, eps=eps, n_classes=k),
        "square": lambda ta, net, eps, _: ta.Square(net, eps=eps),
        # without a seed the library takes the clock
        "autoattack": lambda ta, net, eps, k: ta.AutoAttack(net, eps=eps, n_classes=k, seed=0),
        "cw": lambda ta, net, *_: ta.CW(net),
        "deepfool": lambda ta, net, *_: ta.DeepFool(net),
        "sparsefool": lambda ta, net, *_: ta.SparseFool(net),
        "onepixel": lambda ta, net, *_: ta.OnePixel(net),
        "pixle": lambda ta, net, *_: ta.Pixle(net),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Result of one attack.

    Attributes:
        accuracy: robust accuracy in [0, 1]; exact expectation for a random ensemble.
        unchanged: fraction of images returned unchanged, to 1e-6.
        forwards: forward passes per image through one member.
        backwards: backward passes per image through one member.
        seconds: for all images.
    """

    accuracy: float
    unchanged: float
    forwards: float
    backwards: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The victim and its images."""

    members: Independent
    x: Images
    y: Labels
    eps: float
    num_classes: int
    seed: int

    def expected(self, x: Images) -> Tensor:
        """(B,) probability that a random member is correct."""
        with torch.no_grad():
            parts = [self.members.member_logits(part) for part in x.split(64)]
        right = correct(torch.cat(parts, dim=1), self.y)
        return self.members.mixture @ right.to(self.members.mixture.dtype)

    def figures(self, attack: Callable[[Metered], Tensor]) -> tuple[Figures, Tensor]:
        """Run an attack on the counted members; also return each image's expected correctness."""
        meter = Meter()
        victim = Metered(self.members, meter).eval()
        start = time.perf_counter()
        x_adv = attack(victim).detach()
        seconds = time.perf_counter() - start
        self.members.zero_grad(set_to_none=True)  # the library leaves gradients behind
        left = self.expected(x_adv)
        return Figures(
            accuracy=float(left.mean()),
            # 1e-6, since CW's change of variables does not return exactly the same pixels
            unchanged=float(((x_adv - self.x).abs().flatten(1).amax(1) <= 1e-6).double().mean()),
            forwards=meter.forwards / len(self.x),
            backwards=meter.backwards / len(self.x),
            seconds=seconds,
        ), left


@computing()
def run(
    *,
    images: int = 256,
    model: str = "auto",
    data: str | None = None,
    seed: int = 0,
    train_images: int | None = None,
    single: bool = False,
    names: Sequence[str] | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train the victims briefly, attack them, and gather both tables.

    Args:
        images: number of held-out training images; the test split is not used.
        model: name in `MODELS`; "auto" takes a small one that fits the data.
        data: a data specification, e.g. `cifar10:PATH`; None: the included digits.
        seed: seed of the trainings and of every attack.
        train_images: images per epoch of the victims' training; None: all.
        single: only the first table, so that one network is trained.
        names: attacks to run; None runs all.
        log: called with each line of progress.

    Returns:
        JSON-ready: `settings`, `single` (one row an attack), `random` (None if left out), `notes`.

    Raises:
        ConfigError: an unknown attack, none for the one table wanted, or no training images.
    """
    chosen = list(ATTACKS) if names is None else list(names)
    if unknown := set(chosen) - set(ATTACKS):
        raise ConfigError(
            f"no attack named {', '.join(sorted(unknown))}; choose from {', '.join(ATTACKS)}"
        )
    if single and all(ATTACKS[name].adaptive for name in chosen):
        raise ConfigError(f"--single leaves out the table of {', '.join(chosen)}")
    at_least(1, train_images=1 if train_images is None else train_images)
    dataset = load_dataset(data or "digits")
    if model == "auto":
        model = "digits-cnn" if dataset.name == "digits" else "resnet8"
    library = _library()
    notes = [] if library is not None else [HOW_TO_INSTALL]
    # benchmarks do not read the test split, which is for `evaluate` only
    shown, held, _ = train_validation(dataset, HELD_OUT)
    if images > len(held):
        raise ConfigError(f"{dataset.name} holds {len(held)} images out, not {images}")
    # an unknown or unsuitable model fails here, before the trainings
    build(model, num_classes=dataset.num_classes, shape=dataset.shape, generator=stream(seed))
    log(f"attacking {images} images with each attack, here and with TorchAttacks: minutes")
    for note in notes:
        log(note)
    members = train_members(
        dataset, shown, model, 1 if single else MEMBERS,
        seed=seed, train_images=train_images, log=log,
    )  # fmt: skip
    scene = _scene(dataset, held, members, images, seed)
    # the first table attacks one of the trained members
    alone = _scene(dataset, held, Independent([members.member(0)]), images, seed)
    first = [single_row(alone, name, library, log) for name in chosen if not ATTACKS[name].adaptive]
    second = [random_row(scene, name, log) for name in chosen if _in_second(name) and not single]
    return {
        "settings": {
            "data": dataset.name,
            "model": model,
            "images": len(scene.y),
            "eps": scene.eps,
            "members": members.num_members,
            "seed": seed,
            "train_images": train_images,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "library": LIBRARY if library is not None else None,
        },
        "single": {"clean": float(alone.expected(alone.x).mean()), "rows": first},
        "random": None
        if single
        else {"clean": float(scene.expected(scene.x).mean()), "rows": second},
        "notes": notes,
    }


def _library() -> ModuleType | None:
    try:
        return importlib.import_module("torchattacks")
    except ImportError:
        return None


def _scene(dataset: Dataset, held: Split, members: Independent, images: int, seed: int) -> Scene:
    index = torch.arange(images)
    return Scene(
        members=members,
        x=held.float(index),
        y=held.labels[index].long(),
        eps=EPS.get(dataset.name, 2 / 255),
        num_classes=dataset.num_classes,
        seed=seed,
    )


def train_members(
    dataset: Dataset,
    shown: Split,
    model: str,
    count: int,
    *,
    seed: int,
    train_images: int | None,
    log: Callable[[str], None],
) -> Independent:
    """Undefended networks, trained briefly."""
    nets = [
        build(
            model, num_classes=dataset.num_classes, shape=dataset.shape,
            generator=stream(seed, "bench", "member", m),
        )
        for m in range(count)
    ]  # fmt: skip
    members, epochs = Independent(nets), EPOCHS.get(dataset.name, 1)
    loader = Loader(shown, batch_size=128, seed=seed, augment=False, limit=train_images)
    for _ in fit(members, Vanilla().stages(count, epochs), loader, optim=OPTIM, seed=seed):
        pass  # nothing is saved or logged
    taken = len(shown) if train_images is None else min(train_images, len(shown))
    log(f"trained {count} x {model} on {taken} images, {epochs} epoch(s), seed {seed}")
    return members.eval()


def single_row(
    scene: Scene, name: str, library: ModuleType | None, log: Callable[[str], None]
) -> dict[str, Any]:
    """One attack on one network: the default, the preset, the library."""
    row: dict[str, Any] = {"attack": name}
    default, left = scene.figures(_ours(scene, ATTACKS[name](), name))
    row["default"] = asdict(default)
    preset = _preset(name)
    if preset is not None:
        row["preset"] = asdict(scene.figures(_ours(scene, preset, name))[0])
    if library is not None and name in THEIRS:
        theirs, theirs_left = scene.figures(_theirs(scene, name, library))
        row["theirs"] = asdict(theirs)
        # the preset does the same work as the library; the default may do more
        row["times_faster"] = theirs.seconds / row.get("preset", row["default"])["seconds"]
        gap = paired_difference(left.numpy(), theirs_left.numpy())
        row["default_minus_theirs"] = [gap.value, gap.low, gap.high]
    log(single_line(row))
    return row


def _preset(name: str) -> Attack | None:
    kind = ATTACKS[name]
    if TORCHATTACKS not in kind.presets:
        return None
    # one network is deterministic, so successes are not verified by a second query
    return _with_preset(kind, **({"recheck": False} if kind in (OnePixel, Pixle) else {}))


def _with_preset(kind: Callable[..., Attack], **settings: bool) -> Attack:
    return kind(preset=TORCHATTACKS, **settings)


def _ours(scene: Scene, attack: Attack, name: str) -> Callable[[Metered], Tensor]:
    threat = Threat(eps=scene.eps)

    def go(victim: Metered) -> Tensor:
        rng = stream(scene.seed, "bench", name)
        return attack(victim.member(0), scene.x, scene.y, threat, rng=rng)

    return go


def _theirs(scene: Scene, name: str, library: ModuleType) -> Callable[[Metered], Tensor]:
    def go(victim: Metered) -> Tensor:
        net = victim.member(0).eval()
        # the library draws from the global generators, whose states are restored
        with seeded(scene.seed):
            attack = THEIRS[name](library, net, scene.eps, scene.num_classes)
            x_adv: Tensor = attack(scene.x.clone(), scene.y.clone())
            return x_adv

    return go


def _in_second(name: str) -> bool:
    # the naive evaluation is that of published settings
    return ATTACKS[name].adaptive or TORCHATTACKS in ATTACKS[name].presets


def random_row(scene: Scene, name: str, log: Callable[[str], None]) -> dict[str, Any]:
    """The preset on a random member per call, or an adaptive attack."""
    kind = ATTACKS[name]
    attack = kind() if kind.adaptive else _with_preset(kind)
    threat = Threat(eps=scene.eps)

    def go(victim: Metered) -> Tensor:
        draws = stream(scene.seed, "bench", "draws", name)
        seen = victim if kind.adaptive else victim.sampled(rng=draws, per="call")
        return attack(seen, scene.x, scene.y, threat, rng=stream(scene.seed, "bench", name))

    row: dict[str, Any] = {"attack": name, "aware": kind.adaptive, "bounded": kind.bounded}
    row |= asdict(scene.figures(go)[0])
    log(random_line(row))
    return row

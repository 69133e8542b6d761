"""Conformance tests of plug-ins: tries registered objects on small examples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS, Foreign
from redefense.config import choose, settings_of
from redefense.data import load_dataset, parse
from redefense.defences import DEFENCES
from redefense.ensembles import Independent
from redefense.errors import RedefenseError, one_line
from redefense.evaluation.cells import verify_ball
from redefense.evaluation.plan import attack_of
from redefense.evaluation.suite import SUITES
from redefense.models import build
from redefense.plugins import load_file
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.threat import Threat
from redefense.train.loading import resolve
from redefense.types import Batch

CLASSES, COUNT, SHAPE = 5, 8, (1, 8, 8)
EPS = 0.1


class Broken(Exception):  # noqa: N818 - the result of a test, not a defect of this code
    """A rule of the contract is violated; the text names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Result of the conformance test of one name.

    Attributes:
        name: "KIND.NAME".
        passed: whether all rules hold.
        detail: the rules tested, or the first violation.
    """

    name: str
    passed: bool
    detail: str


def check_file(path: Path) -> list[Found]:
    """Run a plug-in's file, and test everything that it registers.

    Raises:
        ConfigError: if the file cannot be run or registers nothing.
    """
    names = load_file(path)
    return [found(kind, name) for kind, some in names.items() for name in some]


def found(kind: str, name: str) -> Found:
    """Test one registered name."""
    try:
        detail = _CHECKS[kind](name)
    except Exception as error:  # noqa: BLE001 - whatever the code under test raises
        word = "" if isinstance(error, Broken | RedefenseError) else f"{type(error).__name__}: "
        return Found(name=f"{kind}.{name}", passed=False, detail=word + one_line(error))
    return Found(name=f"{kind}.{name}", passed=True, detail=detail)


def network(seed: int) -> nn.Module:
    """A small network with batch norm and dropout, in evaluation mode, of fixed weights."""
    # double precision: in single, results for an image depend on its batch by rounding
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(256, CLASSES),
    ).double()  # fmt: skip
    # scaled by the number of inputs, so that logits have a usual size
    rng = stream(seed, "conformance")
    for p in net.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype, generator=rng) / max(1, p[0].numel()) ** 0.5
    return net.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Images (8, 1, 8, 8) in double precision, and labels."""
    x = torch.rand(COUNT, *SHAPE, dtype=torch.float64, generator=stream(0, "conformance images"))
    return x, torch.arange(COUNT) % CLASSES


def check_attack(name: str) -> str:
    """Test shape, range, ball, equal streams, independence of the batch, and side effects."""
    attack = ATTACKS[name]()
    x, y = batch()
    norms = []
    for norm in attack.norms:
        threat = Threat(norm=norm, eps=EPS)
        net = network(0)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        flags, state = [p.requires_grad for p in net.parameters()], torch.get_rng_state()
        # a copy, since the attack may change its input, with which the result is compared
        x_adv = attack(net, x.clone(), y, threat, rng=stream(0, name))
        if x_adv.shape != x.shape or x_adv.dtype != x.dtype or x_adv.requires_grad:
            raise Broken(f"the result must be detached images like its input: {x_adv.shape}")
        if not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
            raise Broken("the result must lie in [0, 1]")
        if attack.bounded:
            verify_ball(x_adv, x, threat, name)
        if any(p.grad is not None for p in net.parameters()) or net.training:
            raise Broken("it changed the victim's gradients or its mode")
        if any(not torch.equal(value, before[key]) for key, value in net.state_dict().items()):
            raise Broken("it changed the victim's weights or moments")
        if flags != [p.requires_grad for p in net.parameters()]:
            raise Broken("it changed requires_grad of the victim's weights")
        if not torch.equal(torch.get_rng_state(), state):
            raise Broken("it drew from torch's global generator, not from rng")
        if not torch.equal(attack(net, x.clone(), y, threat, rng=stream(0, name)), x_adv):
            raise Broken("equal streams must give equal results")
        order = torch.arange(COUNT).flip(0)
        # noise belongs to an image, not to a row: turned images get turned results
        # foreign functions draw from global generators, for the whole batch at once
        turned = attack(net, x[order], y[order], threat, rng=stream(0, name))
        if not isinstance(attack, Foreign) and not torch.allclose(turned, x_adv[order]):
            raise Broken("the result for an image must not depend on the others of its batch")
        norms.append(f"{norm:g}")
    return f"images in ball and box, equal streams, no side effects; norms {', '.join(norms)}"


def check_defence(name: str) -> str:
    """Test a round trip of settings, stages, a finite loss and a gradient for every parameter."""
    defence = choose(DEFENCES, {"name": name}, "defence")
    again = choose(DEFENCES, settings_of(DEFENCES, defence), "defence")
    if again != defence:
        raise Broken("settings must be the same after they were written to a run's record")
    # two members, since many losses compare members
    ensemble = Independent([network(0).float(), network(1).float()])
    x, y = batch()
    for stage in defence.stages(2, 2):
        ensemble.zero_grad()
        ensemble.train()
        examples = Batch(x.float(), y, torch.arange(COUNT))
        if stage.before is not None:
            stage.before(ensemble)
        for part in stage.loss(ensemble, examples, stream(0, name)):
            if not bool(part.total.isfinite()):
                raise Broken(f"the loss of stage {stage.name} is not finite")
            part.total.backward()
        for m in stage.members:
            for key, p in ensemble.member(m).named_parameters():
                if p.grad is None or not bool(p.grad.isfinite().all()):
                    raise Broken(f"stage {stage.name}: {key} of member {m} has no finite gradient")
    return "settings, stages and gradients of all parameters"


def check_model(name: str) -> str:
    """Test that a network maps images to logits and is initialised from the generator."""
    x, _ = batch()
    given = {"num_classes": CLASSES, "shape": SHAPE}
    state = torch.get_rng_state()
    one, two = (build(name, **given, generator=stream(0, "model")).eval() for _ in range(2))  # type: ignore[arg-type]  # one mapping of both
    if not torch.equal(torch.get_rng_state(), state):
        raise Broken("building it moved torch's global generator")
    with torch.no_grad():
        logits, again = one(x.float()), two(x.float())
    if logits.shape != (COUNT, CLASSES) or not bool(logits.isfinite().all()):
        raise Broken(f"logits must be finite, of shape {(COUNT, CLASSES)}, got {logits.shape}")
    if not torch.equal(logits, again):
        raise Broken("equal generators must give equal weights")
    return f"finite logits {tuple(logits.shape)} for images {tuple(x.shape)}, equal starts"


def check_data(name: str) -> str:
    """Test that the data set can be read; one that needs a path cannot be tested."""
    try:
        parse(name)
    except RedefenseError as error:
        return f"not tried: {error}"
    data, again = load_dataset(name), load_dataset(name)
    if data.checksum() != again.checksum():
        raise Broken("read twice it must be the same")
    return f"{len(data.train)} and {len(data.test)} images of shape {data.shape}"


def check_recipe(name: str) -> str:
    """Test that all its names and settings are known."""
    run, kind, _ = resolve(recipe(name))
    return f"{run.defence['name']}, {kind.num_members} members, {run.data.spec}"


def check_suite(name: str) -> str:
    """Test that all its attacks and settings are known."""
    suite = SUITES[name]
    attacks = [attack_of(spec) for spec in (*suite.cells, *suite.baseline_attacks)]
    return f"{len(suite.cells)} cells: {', '.join(dict.fromkeys(map(repr, attacks)))}"


_CHECKS: Mapping[str, Callable[[str], str]] = {
    "attacks": check_attack,
    "defences": check_defence,
    "models": check_model,
    "datasets": check_data,
    "recipes": check_recipe,
    "suites": check_suite,
}

"""A claim that was changed is refused, with the reason; and one of anybody's weights is as good."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import redefense
from cli_tools import command
from redefense.audit.audit import audit
from redefense.claims import format
from redefense.claims.check import _drawn, check
from redefense.claims.recompute import recompute
from redefense.config import ThreatConfig
from redefense.errors import ConfigError, DataError
from redefense.evaluation.suite import CellSpec, Suite
from redefense.models.randomized import GaussianNoise
from redefense.results.schema import digest
from redefense.threat import Threat

IMAGES = 24
FAST = Suite(
    name="fast",
    cells=(
        CellSpec(attack="fgsm", view="sampled"),
        CellSpec(attack="hinge", view="members", settings={"steps": 2, "restarts": 1}),
    ),
)
Edit = Callable[[dict[str, Any]], object]
ABOUT = ("--name", "mine", "--link", "https://example.org/mine", "--authors", "A. Author")


def network(seed: int = 0) -> torch.nn.Module:
    """Recognises some digits, by the mean of each."""
    data = redefense.data.load_dataset("digits")
    images, labels = data.train.float(), data.train.labels
    rng = torch.Generator().manual_seed(seed)
    means = torch.stack([images[labels == k].mean(0).flatten() for k in range(10)])
    linear = torch.nn.Linear(means.shape[1], 10)
    noise = 0.05 * torch.randn(means.shape, generator=rng)
    with torch.no_grad():
        linear.weight.copy_(4 * (means + noise))
        linear.bias.copy_(-2 * means.square().sum(1))
    return torch.nn.Sequential(torch.nn.Flatten(), linear).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Claims of an ensemble, a single network and a stochastic one, none of them trained by us."""
    home = tmp_path_factory.mktemp("own")
    models: dict[str, Any] = {
        "ensemble": [network(0), network(1)],
        "single": network(0),
        "stochastic": GaussianNoise(network(0), sigma=0.1),
        "cascade": [network(0), network(1)],
    }
    suites = {"stochastic": FAST, "cascade": FAST.cascading(True)}
    for name, model in models.items():
        with warnings.catch_warnings():  # so weak attackers leave a check red
            warnings.simplefilter("ignore", redefense.errors.RedCheckWarning)
            redefense.evaluate(
                model, "digits", threat=Threat(eps=0.1), images=IMAGES, out=home / name,
                suite=suites.get(name, "quick"),
                stochastic="on" if name == "stochastic" else "off",
                batch_size=5 if name == "stochastic" else None,
            )  # fmt: skip
        (report,) = (home / name / "evaluation").glob("*.json")
        made = command(
            "claim", "make", report, "--out", home / f"{name}.json", "--licence", "MIT", *ABOUT
        )
        assert made.code == 0, made.err
    return home


@pytest.mark.parametrize("kind", ["ensemble", "single", "stochastic"])
def test_a_claim_covers_weights_of_anybodys_training(folder: Path, kind: str) -> None:
    path = folder / f"{kind}.json"
    it, stored = format.read(path), json.loads(path.read_text())
    assert it.kind == kind
    assert stored["run"]["defence"]["name"] == "mine"
    assert stored["run"]["ensemble"]["name"] == {
        "ensemble": "independent", "single": "network", "stochastic": "stochastic",
    }[kind]  # fmt: skip
    (file,) = (folder / kind / "evaluation").glob("*.json")
    report = json.loads(file.read_text())
    (found,) = it.evaluations
    assert found.aware is not None
    assert found.aware.value == pytest.approx(report["headline"]["aware"], abs=1e-6)
    assert found.exact is (kind != "stochastic")
    assert it.training.parameters == (2 if kind == "ensemble" else 1) * 10 * (64 + 1)
    checked = command("claim", "check", path)
    assert (checked.code, checked.err) == (0, "")
    assert checked.out.endswith(f"{path}: holds\n")


def test_a_claim_whose_aware_attacks_met_a_part_of_the_images_holds(folder: Path) -> None:
    (found,) = format.read(folder / "cascade.json").evaluations
    hinge = found.cells[-1]
    assert hinge.aware
    assert hinge.met is not None
    assert (format.unpacked(hinge.met) > 0).sum() < IMAGES
    checked = command("claim", "check", folder / "cascade.json")
    assert (checked.code, checked.err) == (0, "")


def without(key: str) -> Edit:
    return lambda claim: claim.pop(key)


def figure(claim: dict[str, Any]) -> None:
    claim["evaluations"][0]["aware"]["value"] += 0.05


def clean(claim: dict[str, Any]) -> None:
    claim["evaluations"][0]["clean"]["value"] += 0.05


def interval(claim: dict[str, Any]) -> None:
    claim["evaluations"][0]["aware"]["low"] += 0.02


def unaware(claim: dict[str, Any]) -> None:
    claim["evaluations"][0]["unaware"]["low"] -= 0.02


def around(key: str) -> Edit:
    """Moves an interval past its figure."""

    def edit(claim: dict[str, Any]) -> None:
        found = claim["evaluations"][0][key]
        found = found[1] if isinstance(found, list) else found
        found["low"], found["high"] = found["value"] + 0.01, found["value"] + 0.02

    return edit


def record(claim: dict[str, Any]) -> None:
    cell = claim["evaluations"][0]["cells"][0]
    q = format.unpacked(cell["each"])
    q[q.argmin()] = 1.0
    cell["each"] = format.packed(q)


def swapped(claim: dict[str, Any]) -> None:
    """The mean stays as it is."""
    cell = claim["evaluations"][0]["cells"][-1]
    cell["each"] = format.packed(format.unpacked(cell["each"])[::-1])


def attack(claim: dict[str, Any]) -> None:
    del claim["evaluations"][0]["cells"][-1]


def steps(claim: dict[str, Any]) -> None:
    cell = claim["evaluations"][0]["cells"][-1]
    cell["repr"] = cell["repr"].replace("steps=20", "steps=2")


def default(claim: dict[str, Any]) -> None:
    """A setting that the suite does not give."""
    cell = claim["evaluations"][0]["cells"][-1]
    cell["repr"] = cell["repr"].replace("restarts=1", "restarts=9")


def images(claim: dict[str, Any]) -> None:
    claim["evaluations"][0]["data"]["num_images"] = 400


def gain(claim: dict[str, Any]) -> None:
    claim["evaluations"][0]["over_averaged"]["value"] += 0.1


def radius(claim: dict[str, Any]) -> None:
    claim["evaluations"][0]["eps"] *= 2


def unreadable(claim: dict[str, Any]) -> None:
    """Of an attack without accuracies, which ran only on images that others had left right."""
    claim["evaluations"][0]["cells"][-1] |= {"each": None, "expected": None, "met": "eA=="}


def flag(key: str) -> Edit:
    def edit(claim: dict[str, Any]) -> None:
        cell = claim["evaluations"][0]["cells"][-1]
        cell[key] = not cell[key]

    return edit


def suite(claim: dict[str, Any]) -> None:
    claim["evaluations"][0]["suites"][0]["suite"] = "quik"


def members(claim: dict[str, Any]) -> None:
    found = claim["evaluations"][0]
    found["clean_members"] = [1.0] * len(found["clean_members"])


CHANGES: dict[str, tuple[Edit, str, str]] = {
    "figure": (figure, "records-contradict", "aware is stated as"),
    "clean": (clean, "records-contradict", "clean is stated as"),
    "interval": (interval, "interval", "The low end of the interval of aware"),
    "record": (record, "records-contradict", "its records give"),
    "swapped": (swapped, "aware-records", "is not the worst attack's on"),
    "attack": (attack, "missing-attack", "hinge(steps=20) on view members belongs to suite quick"),
    "steps": (steps, "missing-attack", "hinge(steps=20) on view members belongs to suite quick"),
    "default": (default, "missing-attack", "its result is missing or of other settings"),
    "unaware": (unaware, "interval", "The low end of the interval of unaware is stated as"),
    "single": (around("over_single"), "interval", "outside its interval"),
    "averaged": (around("averaged"), "interval", "averaged is"),
    "alone": (around("alone"), "interval", "alone, member 1 is"),
    "images": (images, "records-damaged", "are of 24 images, expected 400"),
    "unreadable": (unreadable, "records-damaged", "met are of 0 images, expected 24"),
    "gain": (gain, "difference", "over_averaged is not the aware figure minus"),
    "radius": (radius, "budget", "is of another budget than the claim's"),
    "aware": (flag("aware"), "attack-kind", "aware=False, but its attack is aware=True"),
    "bounded": (flag("bounded"), "attack-kind", "bounded=False, but its attack is bounded=True"),
    "suite": (suite, "unknown-suite", "Suite quik is unknown"),
    "members": (members, "clean-members", "its members have 100.00 % to 100.00 %"),
    "authors": (without("authors"), "unattributed", "authors is not stated"),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("hashed", [True, False], ids=["hash kept", "hash made again"])
def test_what_was_changed_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, change: str, hashed: bool
) -> None:
    edit, rule, reason = CHANGES[change]
    claim = json.loads((folder / "ensemble.json").read_text())
    edit(claim)
    if not hashed:
        rest = {key: value for key, value in claim.items() if key != "sha256"}
        claim["sha256"] = digest(rest)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(claim))
    checked = command("claim", "check", path, "--json")
    assert checked.code == 1
    document = json.loads(checked.out)
    assert document["holds"] is False
    errors = {
        f["id"]: f["why"] for f in document["findings"][str(path)] if f["severity"] == "error"
    }
    assert reason in errors[rule]
    assert ("hash" in errors) is hashed
    words = command("claim", "check", path)
    assert words.code == 1
    assert reason in words.out
    assert words.out.endswith(f"{path}: does not hold\n")


def parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document, of lists the first element."""
    keys = value if isinstance(value, dict) else range(len(value[:1]))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from parts(value[key])


@pytest.mark.parametrize("other", [None, -1, "x", []], ids=repr)
def test_a_claim_in_which_anything_was_replaced_is_refused(
    folder: Path, tmp_path: Path, other: object
) -> None:
    claim = json.loads((folder / "ensemble.json").read_text())
    path, count = tmp_path / "changed.json", 0
    for container, key in list(parts(claim)):
        before = container[key]
        if before == other:
            continue
        container[key] = other
        path.write_text(json.dumps(claim))
        container[key] = before
        assert any(f.severity == "error" for f in check(path)), key
        count += 1
    assert count > 100


def test_what_cannot_be_read_exits_3_and_the_others_are_checked_all_the_same(
    folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for bad in (broken, tmp_path / "missing.json"):
        checked = command("claim", "check", bad, folder / "single.json")
        assert checked.code == 3
        assert f"cannot read {bad}" in checked.err
        assert f"{folder / 'single.json'}: holds" in checked.out


def test_other_weights_are_refused_and_the_same_ones_agree(folder: Path, tmp_path: Path) -> None:
    it = format.read(folder / "single.json")
    assert recompute(it, "digits", tmp_path / "same", weights=network(0)) == []
    with pytest.raises(DataError, match="the claim is of"):
        recompute(it, "digits", tmp_path / "other", weights=network(1))
    with pytest.raises(ConfigError, match="pass their folder with --weights"):
        recompute(it, "digits", tmp_path / "none")


@pytest.mark.filterwarnings("ignore::redefense.errors.RedCheckWarning")  # weak attacks
def test_random_outputs_are_recomputed_to_the_digit_with_their_batch_size(
    folder: Path, tmp_path: Path
) -> None:
    it = format.read(folder / "stochastic.json")
    assert recompute(it, "digits", tmp_path, weights=GaussianNoise(network(0), sigma=0.1)) == []
    (again,) = tmp_path.rglob("evaluation/fast.json")
    (before,) = (folder / "stochastic").rglob("evaluation/fast.json")
    first, other = (json.loads(file.read_text()) for file in (before, again))
    assert first["plan"]["batch_size"] == other["plan"]["batch_size"] == 5
    assert first["headline"] == other["headline"]


def test_a_claim_of_own_weights_says_who_made_them(folder: Path, tmp_path: Path) -> None:
    report = folder / "single" / "evaluation" / "quick.json"
    made = command("claim", "make", report, "--out", tmp_path / "x.json", "--name", "mine")
    assert made.code == 2
    assert "needs --link, --authors, --licence" in made.err
    assert not (tmp_path / "x.json").exists()


def test_evaluations_of_other_weights_make_no_claim(folder: Path, tmp_path: Path) -> None:
    reports = [folder / name / "evaluation" / "quick.json" for name in ("single", "ensemble")]
    made = command(
        "claim", "make", *reports, "--out", tmp_path / "x.json", "--licence", "MIT", *ABOUT
    )
    assert made.code == 3
    assert "is an evaluation of other weights" in made.err


def test_an_older_version_of_a_suite_is_told(folder: Path, tmp_path: Path) -> None:
    claim = json.loads((folder / "ensemble.json").read_text())
    claim["evaluations"][0]["suites"][0]["version"] = "0" * 12
    path = tmp_path / "older.json"
    path.write_text(json.dumps(claim))
    assert "Suite quick was version 000000000000" in command("claim", "check", path).out
    it = format.read(path)
    with pytest.raises(DataError, match="suite quick has other attacks now"):
        recompute(it, "digits", tmp_path, weights=network())


@pytest.mark.parametrize("version", [None, "0" * 12])
def test_an_attack_that_every_version_of_a_suite_has_may_not_be_missing(
    folder: Path, tmp_path: Path, version: str | None
) -> None:
    claim = json.loads((folder / "ensemble.json").read_text())
    claim["evaluations"][0]["suites"][0]["version"] = version
    attack(claim)
    claim["sha256"] = digest({key: claim[key] for key in claim if key != "sha256"})
    path = tmp_path / "older.json"
    path.write_text(json.dumps(claim))
    checked = command("claim", "check", path)
    assert checked.code == 1
    assert "hinge on view members belongs to suite quick" in checked.out


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Path:
    """A claim under a suite with attacks at the threat of the evaluation, and at 8/255."""
    fixed = ThreatConfig(eps=8 / 255)
    cells = (
        *FAST.cells,
        CellSpec(attack="fgsm", view="averaged", threat=fixed),
        CellSpec(attack="deepfool", view="averaged", threat=fixed),
    )
    with warnings.catch_warnings():  # so weak attackers leave a check red
        warnings.simplefilter("ignore", redefense.errors.RedCheckWarning)
        redefense.evaluate(
            [network(0), network(1)], "digits", threat=Threat(eps=0.03), images=IMAGES,
            out=folder / "mixed", suite=Suite(name="mixed", cells=cells), stochastic="off",
        )  # fmt: skip
    report = folder / "mixed" / "evaluation" / "mixed.json"
    path = folder / "mixed.json"
    made = command("claim", "make", report, "--out", path, "--licence", "MIT", *ABOUT)
    assert made.code == 0, made.err
    return path


def test_each_evaluation_of_a_suite_of_several_threats_has_its_attacks(
    mixed: Path, tmp_path: Path
) -> None:
    report = mixed.with_suffix("") / "evaluation" / "mixed.json"
    # the audit takes both radii for one, and the headline is still that of one of them
    assert [f for f in (*check(mixed), *audit(report)) if f.severity == "error"] == []
    claim = json.loads(mixed.read_text())
    own, fixed = claim["evaluations"]
    assert (own["eps"], fixed["eps"]) == (0.03, pytest.approx(8 / 255))
    assert [cell["attack"] for cell in own["cells"]] == ["fgsm", "hinge", "deepfool"]
    path = tmp_path / "fewer.json"
    # the radius of the suite has more decimals than that of the evaluation
    for found, index in ((fixed, 0), (own, 0), (own, 1), (own, 2)):
        cell = found["cells"].pop(index)
        path.write_text(json.dumps(claim))
        found["cells"].insert(index, cell)
        missing = [f.why for f in check(path) if f.id == "missing-attack"]
        assert len(missing) == 1
        assert missing[0].startswith(cell["attack"])


@pytest.mark.parametrize("name", ["/tmp/evil", "../../evil", "..", "", ".evil", "C:evil", "a\\b"])
def test_names_that_become_files_lie_in_no_other_folder(folder: Path, name: str) -> None:
    claim = json.loads((folder / "cascade.json").read_text())
    (plan,) = claim["evaluations"][0]["suites"]
    for part in (claim, plan["suite"]):
        before, part["name"] = part["name"], name
        with pytest.raises(DataError, match="must be printable text without / and"):
            format.parse(claim, Path("x.json"))
        part["name"] = before
    plan["file"] = name
    with pytest.raises(DataError, match="file: a name in a claim must be"):
        format.parse(claim, Path("x.json"))


def test_a_claim_is_made_under_no_such_name(folder: Path, tmp_path: Path) -> None:
    report = folder / "single" / "evaluation" / "quick.json"
    words = ("claim", "make", report, "--out", tmp_path / "x.json", "--licence", "MIT")
    made = command(*words, *ABOUT[2:], "--name", "a/b")
    assert made.code == 2
    assert "got 'a/b'; choose another name" in made.err


def test_the_protocol_of_a_deterministic_method_is_the_average(folder: Path) -> None:
    it = format.read(folder / "ensemble.json")
    (found,) = it.evaluations
    assert _drawn(it, found)  # weights of others: queries draw a member
    epochs = it.training.model_copy(update={"epochs": 1})
    for name, drawn in (("vanilla", False), ("red", True)):
        run = {**it.run, "defence": {"name": name}}
        trained = it.model_copy(update={"training": epochs, "run": run})
        assert _drawn(trained, found) is drawn


def test_records_are_kept_to_half_a_level() -> None:
    q = np.random.default_rng(0).random(100)
    np.testing.assert_allclose(format.unpacked(format.packed(q) or ""), q, atol=0.5 / 65535)

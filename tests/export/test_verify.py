"""The freeze detector: sound bundles hold, and every way to freeze one is caught."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import chi2

from export_tools import ABOUT, SHAPE, edit_member, plain, set_config, set_probes, spoil
from redefense.errors import DataError
from redefense.export import export, runner
from redefense.export.draws import ALARM, chi_square_p, draw_faults
from redefense.export.rules import graph_faults
from redefense.export.verify import CHECKS, verify

SHARES = [0.5, 0.25, 0.25]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(plain(3, mixture=SHARES), tmp_path_factory.mktemp("v") / "sound", ABOUT)


def red(folder: Path) -> dict[str, str]:
    """The checks that a bundle fails, with their reasons."""
    return {check.id: check.detail for check in verify(folder) if not check.passed}


def test_a_sound_bundle_holds_in_every_respect(sound: Path) -> None:
    checks = verify(sound)
    assert [check.id for check in checks] == list(CHECKS)
    assert all(check.passed for check in checks), checks


def copy_member(folder: Path, source: int, target: int) -> None:
    shutil.copy(folder / f"members/{source}.onnx", folder / f"members/{target}.onnx")


def one_file_for_all(folder: Path) -> None:
    copy_member(folder, 0, 1)
    copy_member(folder, 0, 2)


def swapped(folder: Path) -> None:
    (folder / "members/0.onnx").rename(folder / "spare")
    copy_member(folder, 1, 0)
    (folder / "spare").rename(folder / "members/1.onnx")


def almost_one(folder: Path) -> None:
    """One file for two members, and probes forged to within the tolerance."""
    copy_member(folder, 0, 1)
    with np.load(folder / "probes.npz") as stored:
        images, logits = stored["images"], stored["logits"]
    logits[1] = logits[0] * (1 + 1e-6)
    set_probes(folder, images, logits)


def one_in_the_probes_too(folder: Path) -> None:
    """One file for all members, and probes that agree."""
    one_file_for_all(folder)
    with np.load(folder / "probes.npz") as stored:
        images, logits = stored["images"], stored["logits"]
    set_probes(folder, images, logits[:1].repeat(len(logits), axis=0))


def drawn_inside(folder: Path) -> None:
    """One graph that adds noise of its own to the logits."""

    def add_noise(model: Any) -> None:
        model.graph.node[-1].output[0] = "before"
        noise = helper.make_node("RandomUniformLike", ["before"], ["noise"])
        model.graph.node.extend([noise, helper.make_node("Add", ["before", "noise"], ["logits"])])

    edit_member(folder, 2, add_noise)


def always_the_first(folder: Path) -> None:
    text = (folder / "run.py").read_text()
    changed = text.replace(
        "draw_members(bundle.mixture, len(images))", "np.zeros(len(images), int)"
    )
    assert changed != text
    (folder / "run.py").write_text(changed)


def first_by_mixture(folder: Path) -> None:
    set_config(folder, mixture=[1.0, 0.0, 0.0])


def by_batch(folder: Path) -> None:
    """Logits less their mean over the batch: an answer that its neighbours change."""

    def centre(model: Any) -> None:
        model.graph.node[-1].output[0] = "before"
        model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
        mean = helper.make_node("ReduceMean", ["before", "axis"], ["mean"], keepdims=1)
        model.graph.node.extend([mean, helper.make_node("Sub", ["before", "mean"], ["logits"])])

    edit_member(folder, 0, centre)
    with np.load(folder / "probes.npz") as stored:
        images, logits = stored["images"], stored["logits"]
    logits[0] -= logits[0].mean(0)
    set_probes(folder, images, logits)


@pytest.mark.parametrize(
    ("freeze", "check", "says"),
    [
        (
            one_file_for_all,
            "members",
            "member 1 does not give its recorded outputs, but those of member 0",
        ),
        (swapped, "members", "member 0 does not give its recorded outputs, but those of member 1"),
        (almost_one, "distinct", "members 0 and 1 are the same"),
        (one_in_the_probes_too, "distinct", "nothing is random"),
        (drawn_inside, "graphs", "RandomUniformLike"),
        (always_the_first, "draws", "not the runner"),
        (first_by_mixture, "draws", "1 of 3 members answer"),
        (by_batch, "members", "other images of a batch"),
    ],
)
def test_a_frozen_bundle_is_caught(
    sound: Path, freeze: Callable[[Path], None], check: str, says: str, tmp_path: Path
) -> None:
    assert says in red(spoil(sound, tmp_path / "frozen", freeze))[check]


def test_files_must_be_those_of_the_manifest(sound: Path, tmp_path: Path) -> None:
    bad = tmp_path / "b"
    shutil.copytree(sound, bad)
    (bad / "extra.py").write_text("import os")
    assert "extra.py" in red(bad)["records"]
    (bad / "extra.py").unlink()
    (bad / "link").symlink_to("/")
    assert "link" in red(bad)["records"]
    (bad / "link").unlink()
    model = bytearray((bad / "members/0.onnx").read_bytes())
    model[-1] ^= 1
    (bad / "members/0.onnx").write_bytes(model)
    found = red(bad)
    assert "members/0.onnx has another SHA-256" in found["records"]
    assert found["members"] == found["records"]  # nothing runs a file whose hash does not hold
    (bad / "members/0.onnx").unlink()
    assert "missing" in red(bad)["records"]


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "probes.npz"])
def test_damaged_records_are_named(sound: Path, name: str, tmp_path: Path) -> None:
    bad = tmp_path / "b"
    shutil.copytree(sound, bad)
    (bad / name).write_bytes((bad / name).read_bytes()[:-40])
    assert any(name in reason for reason in red(bad).values())


def test_probes_that_are_no_archive_are_refused(sound: Path, tmp_path: Path) -> None:
    bad = spoil(sound, tmp_path / "b", lambda b: (b / "probes.npz").write_bytes(b"PK no"))
    assert "probes.npz cannot be read" in red(bad)["members"]


def test_no_bundle_is_another_thing_than_one_that_does_not_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no bundle"):
        verify(tmp_path)


# --- rules for graphs ---


def member(*nodes: Any, weights: tuple[Any, ...] = (), **ends: Any) -> Any:
    """A small model: whatever the nodes do, then a matrix."""
    matrix = numpy_helper.from_array(np.ones((64, 10), np.float32), "matrix")
    shape = numpy_helper.from_array(np.array([-1, 64]), "flat")
    last = nodes[-1].output[0] if nodes else "images"
    tail = [
        helper.make_node("Reshape", [last, "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "matrix"], ["logits"]),
    ]
    batch = ends.get("batch", "batch")
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *SHAPE])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])]
    graph = helper.make_graph(
        [*nodes, *tail], "g", inputs, outputs, initializer=[matrix, shape, *weights]
    )
    opsets = [helper.make_opsetid("", 18), *ends.get("opsets", [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def external() -> Any:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


THEN = helper.make_graph(
    [helper.make_node("Identity", ["images"], ["t"])], "t", [],
    [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
)  # fmt: skip
ONE = numpy_helper.from_array(np.ones(1, np.float32), "o")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (member(helper.make_node("Multinomial", ["images"], ["a"])), "Multinomial"),
        (member(helper.make_node("Dropout", ["images"], ["a"])), "Dropout"),
        (member(helper.make_node("Bernoulli", ["images"], ["a"])), "Bernoulli"),
        (
            member(
                helper.make_node("Strange", ["images"], ["a"], domain="org.me"),
                opsets=[helper.make_opsetid("org.me", 1)],
            ),
            "unknown",
        ),
        (
            member(
                helper.make_node(
                    "BatchNormalization", ["images", *"oooo"], ["a", "b", "c"], training_mode=1
                ),
                weights=(ONE,),
            ),
            "training mode",
        ),
        (member(weights=(ONE, ONE)), "twice"),
        (member(weights=(external(),)), "outside the file"),
        (member(batch=1), "images must be float32 of shape"),
        (
            member(
                helper.make_node("If", ["yes"], ["a"], then_branch=THEN, else_branch=THEN),
                weights=(numpy_helper.from_array(np.array([True]), "yes"),),
            ),
            "If",
        ),
    ],
)
def test_a_graph_that_is_no_fixed_function_in_one_file_is_refused(model: Any, says: str) -> None:
    assert says in "; ".join(graph_faults(model.SerializeToString(), SHAPE, 10))


def test_a_plain_graph_has_no_fault_and_a_damaged_one_is_no_graph() -> None:
    sound = member(helper.make_node("Relu", ["images"], ["a"]))
    assert graph_faults(sound.SerializeToString(), SHAPE, 10) == []
    assert "valid ONNX" in graph_faults(b"\x01\x02", SHAPE, 10)[0]
    sound.functions.append(
        onnx.helper.make_function("own", "F", ["x"], ["y"], [], [helper.make_opsetid("", 18)])
    )
    assert "function F" in "; ".join(graph_faults(sound.SerializeToString(), SHAPE, 10))


# --- draws ---


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("statistic", [0.5, 3.0, 40.0])
def test_the_chi_square_law_is_scipys(size: int, statistic: float) -> None:
    probs = np.full(size, 1 / size)
    counts = np.full(size, 1_000_000)
    shift = int(np.sqrt(statistic * 1_000_000 / 2))
    counts[:2] += [shift, -shift]
    exact = 2 * shift**2 / 1_000_000
    assert chi_square_p(counts, probs) == pytest.approx(chi2.sf(exact, size - 1), rel=1e-9)


def test_sound_draws_raise_no_alarm_and_their_p_is_uniform() -> None:
    mixture = np.array(SHARES)
    assert draw_faults(runner.draw_members, mixture) == []
    rng = np.random.default_rng(0)
    p = [chi_square_p(rng.multinomial(2000, mixture), mixture) for _ in range(400)]
    assert abs(np.mean(p) - 0.5) < 0.07
    assert min(p) > ALARM


Draws = NDArray[np.int64]


def constant(mixture: NDArray[np.float64], count: int) -> Draws:
    return np.zeros(count, np.int64)


def uniform(mixture: NDArray[np.float64], count: int) -> Draws:
    return np.random.default_rng(1).integers(len(mixture), size=count)


def one_a_batch(mixture: NDArray[np.float64], count: int) -> Draws:
    drawn = np.random.default_rng(2).choice(len(mixture), size=count // 4, p=mixture)
    return drawn.repeat(4)


def by_modulo(mixture: NDArray[np.float64], count: int) -> Draws:
    return np.random.default_rng(3).integers(256, size=count) % len(mixture)


@pytest.mark.parametrize(
    ("draw", "mixture", "says"),
    [
        (constant, SHARES, "mixture"),
        (uniform, SHARES, "mixture"),
        (one_a_batch, SHARES, "neighbouring"),
        (by_modulo, [1 / 100] * 100, "mixture"),
    ],
)
def test_draws_that_are_not_what_they_say_are_caught(
    draw: Callable[[NDArray[np.float64], int], Draws], mixture: list[float], says: str
) -> None:
    assert says in draw_faults(draw, np.array(mixture))[0]


def test_verifying_needs_no_torch() -> None:
    code = "import sys, redefense.export.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

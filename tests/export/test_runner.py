"""The runner that travels: whatever a bundle or an image holds, it says one line about it."""

import ast
import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from redefense.export import runner
from redefense.export.runner import BundleError, read_image, records

SHAPE = (1, 8, 8)
MEMBERS = ["members/0.onnx", "members/1.onnx"]
PLAIN: dict[str, Any] = {
    "schema": 1, "format": "redefense-bundle", "kind": "plain", "precision": "fp32",
    "num_members": 2, "mixture": [0.5, 0.5], "classes": ["a", "b"], "members": MEMBERS,
    "input": {"name": "images", "shape": [1, 8, 8]}, "output": {"name": "logits"},
}  # fmt: skip
COMPACT: dict[str, Any] = {
    **PLAIN,
    "kind": "compact",
    "compact": {
        "template": "template", "weights": "weights", "unit": 4, "taps": "mean", "shared": False,
        "grids": [{"name": "conv", "rows": 1, "columns": 1, "size": 3}],
    },
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "plain": {name: {} for name in MEMBERS},
    "compact": {"template": {}, "weights": {}},
}
STRANGE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    "x",
    [],
    {},
    [1],
    [[]],
    [None],
    [{}],
    {"a": 1},
    10**400,
)


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _places(node[key], (*path, key))


@pytest.mark.parametrize("sound", [PLAIN, COMPACT], ids=["plain", "compact"])
def test_whatever_a_config_holds_it_is_taken_or_refused_in_words(sound: dict[str, Any]) -> None:
    records._check_config(sound, FILES[sound["kind"]])
    for *path, last in _places(sound):
        for value in STRANGE:
            changed = copy.deepcopy(sound)
            holder: Any = changed
            for key in path:
                holder = holder[key]
            holder[last] = value
            # anything but a BundleError fails
            with contextlib.suppress(BundleError):
                records._check_config(changed, FILES[sound["kind"]])


def _refused(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        read_image(path, SHAPE)
    return str(caught.value)


def test_files_without_fitting_images_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "none.npy", np.zeros((0, *SHAPE), np.float32))
    np.save(tmp_path / "number.npy", np.float32(1))
    np.savez(tmp_path / "archive.npz", np.zeros(SHAPE, np.float32))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "empty.npy").touch()
    for name in ("none", "number", "archive", "empty", "missing"):
        path = tmp_path / f"{name}.npy"
        assert str(path) in _refused(path)


def test_a_picture_of_16_bits_is_refused_rather_than_cut(tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(deep)
    assert "8 bits" in _refused(deep)


def test_the_working_folder_can_become_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with runner.aside(Path()) as folder:
        (folder / "config.json").write_text(json.dumps({}))
    assert [path.name for path in here.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    "elsewhere", ["../../evil.onnx", "/tmp/evil.onnx", "run.py", "members/1.onnx"]
)
def test_no_member_is_written_elsewhere(elsewhere: str) -> None:
    for sound in (PLAIN, COMPACT):
        files = {**FILES[sound["kind"]], elsewhere: {}}
        changed = {**sound, "members": [elsewhere, "members/1.onnx"]}
        with pytest.raises(BundleError, match=r"members must be 2 files, members/0\.onnx"):
            records._check_config(changed, files)
    with pytest.raises(BundleError, match="not there yet"):
        records._check_config(COMPACT, {**FILES["compact"], "members/0.onnx": {}})


def test_run_py_defines_every_name_of_its_parts_once() -> None:
    defined = []
    for node in ast.parse(runner.text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.Assign):
            defined += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            defined.append(node.target.id)  # type: ignore[union-attr]  # a plain name
    assert len(defined) == len(set(defined)), "a part hides a name of another one"
    assert set(runner.__all__) - {"text"} <= set(defined)

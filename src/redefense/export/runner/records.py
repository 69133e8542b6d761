"""The records of a bundle: its configuration and manifest, read, checked and written."""

import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redefense.export.runner.errors import BundleError, Floats
from redefense.export.runner.kernels import GRID, TAPS, initialisers, written
from redefense.export.runner.sessions import open_session

SCHEMA = 1
FORMAT = "redefense-bundle"
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
"""An Ed25519 signature of the manifest may lie beside it (`export --sign`, `verify --signer`). This
file does not check it: whoever can change a bundle can change this file, too."""

Trust = Callable[[Path, bytes], None]
"""Raises BundleError where a folder's manifest, as it was read, is not to be trusted."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_JSON_LIMIT = 16 * 2**20


@dataclass(frozen=True)
class Bundle:
    """A bundle's description of itself, checked.

    Attributes:
        path: the folder.
        config: `config.json`.
        files: name of each file to its "sha256" and "bytes", from `manifest.json`.
    """

    path: Path
    config: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.config["input"]["shape"]
        return channels, height, width

    @property
    def num_members(self) -> int:
        return int(self.config["num_members"])

    @property
    def mixture(self) -> NDArray[np.float64]:
        """(M,) probabilities with which members answer."""
        return np.asarray(self.config["mixture"], np.float64)

    @property
    def classes(self) -> list[str]:
        return list(self.config["classes"])

    def read(self, name: str) -> bytes:
        """A file's content, if it matches the manifest.

        Raises:
            BundleError: naming the file.
        """
        entry, place = self.files.get(name), self.path / name
        if entry is None:
            raise BundleError(f"{name} is not in the manifest")
        if place.is_symlink() or place.parent.is_symlink() or not place.is_file():
            raise BundleError(f"{name} is missing or no plain file")
        if place.stat().st_size != entry["bytes"]:
            raise BundleError(
                f"{name} has {place.stat().st_size} bytes, the manifest states {entry['bytes']}"
            )
        data = place.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise BundleError(f"{name} has another SHA-256 than in the manifest")
        return data

    def member(self, m: int) -> bytes:
        """The ONNX file of member m, written out if the bundle is compact."""
        if self.config["kind"] == "plain":
            return self.read(str(self.config["members"][m]))
        compact = self.config["compact"]
        tensors = written(self.weights(), compact, m)
        return self.read(str(compact["template"])) + initialisers(tensors)

    def weights(self) -> dict[str, Floats]:
        """The stored weights of a compact bundle by name."""
        return _arrays(self, str(self.config["compact"]["weights"]))

    def open(self, m: int, *, threads: int = 0) -> Any:
        """A session of onnxruntime for member m; `threads` 0 leaves their number to it."""
        return open_session(self.member(m), threads=threads)

    def probes(self) -> tuple[Floats, Floats]:
        """Images (64, C, H, W) and each member's logits (M, 64, classes) in torch, fp32."""
        stored = _arrays(self, "probes.npz")
        if set(stored) != {"images", "logits"}:
            raise BundleError(f"probes.npz must hold images and logits, it has {sorted(stored)}")
        images, logits = stored["images"], stored["logits"]
        if images.shape[1:] != self.shape or not len(images):
            raise BundleError(f"probes.npz holds images of shape {images.shape}")
        if logits.shape != (self.num_members, len(images), len(self.classes)):
            raise BundleError(f"probes.npz holds logits of shape {logits.shape}")
        return images, logits


def open_bundle(path: str | Path, trust: Trust | None = None) -> Bundle:
    """Read and check the records of a bundle; its other files are checked when they are read.

    Args:
        path: the folder.
        trust: checks the manifest before anything in it is used.

    Raises:
        BundleError: naming what is missing or wrong.
    """
    folder = Path(path)
    manifest = _json(folder, MANIFEST, None, trust)
    files = manifest.get("files")
    if manifest.get("schema") != SCHEMA or not isinstance(files, dict):
        raise BundleError(f"{MANIFEST} has schema {manifest.get('schema')!r}, not {SCHEMA}")
    for name, entry in files.items():
        if not _NAME.fullmatch(name):
            raise BundleError(f"{MANIFEST} names {name!r}, which is no file inside a bundle")
        known = isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
        if not known or not re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256"))):
            raise BundleError(f"{MANIFEST} has no size and SHA-256 for {name}")
    bundle = Bundle(folder, {}, files)
    config = _json(folder, "config.json", bundle)
    _check_config(config, files)
    return Bundle(folder, config, files)


def _json(
    folder: Path, name: str, bundle: Bundle | None, trust: Trust | None = None
) -> dict[str, Any]:
    place = folder / name
    if not place.is_file() or place.is_symlink():
        raise BundleError(f"{folder} is no bundle: it lacks {name}")
    if place.stat().st_size > _JSON_LIMIT:
        raise BundleError(f"{name} is larger than {_JSON_LIMIT} bytes")
    raw = bundle.read(name) if bundle is not None else place.read_bytes()
    if trust is not None:
        trust(folder, raw)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{name} must hold an object")
    return value


def _arrays(bundle: Bundle, name: str) -> dict[str, Floats]:
    """The arrays of an `.npz` file, all finite and float32; nothing in it is executed."""
    raw = bundle.read(name)
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except Exception as error:  # noqa: BLE001 - numpy and zipfile raise many kinds on damaged files
        raise BundleError(f"{name} cannot be read: {error}") from None
    for key, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise BundleError(f"{name} must hold finite float32, {key} does not")
    return arrays


def _need(holds: bool, key: str, rule: str, found: Any) -> None:
    if not holds:
        shown = json.dumps(found)[:200]
        raise BundleError(f"config.json: {key} must be {rule}, got {shown}")


def _check_config(config: dict[str, Any], files: dict[str, Any]) -> None:
    """Refuse a config that breaks the format, whatever it holds instead.

    Raises:
        BundleError: naming the key and its value.
    """

    def need(holds: bool, key: str, rule: str) -> None:
        _need(holds, key, rule, config.get(key))

    need(config.get("schema") == SCHEMA, "schema", str(SCHEMA))
    need(config.get("format") == FORMAT, "format", FORMAT)
    need(config.get("kind") in ("plain", "compact"), "kind", "plain or compact")
    need(config.get("precision") in ("fp32", "int8"), "precision", "fp32 or int8")
    count, mixture = config.get("num_members"), config.get("mixture")
    need(type(count) is int and count >= 1, "num_members", "a whole number from 1")
    listed = isinstance(mixture, list) and len(mixture) == count
    shares = listed and all(type(p) in (int, float) and 0 <= p <= 1 for p in mixture or ())
    need(shares, "mixture", f"{count} probabilities")
    need(abs(math.fsum(mixture or ()) - 1) < 1e-5, "mixture", "a distribution")
    classes = config.get("classes")
    named = isinstance(classes, list) and all(isinstance(c, str) for c in classes)
    need(named and len(classes or ()) >= 1, "classes", "a list of names")
    fed, answer = config.get("input"), config.get("output")
    shape = fed.get("shape") if isinstance(fed, dict) else None
    sizes = isinstance(shape, list) and all(type(n) is int and n >= 1 for n in shape)
    need(sizes and len(shape or ()) == 3, "input", "an object with the shape [C, H, W]")
    need(isinstance(fed, dict) and fed.get("name") == "images", "input", 'named "images"')
    need(isinstance(answer, dict) and answer.get("name") == "logits", "output", 'named "logits"')
    members = config.get("members")
    # exactly these: `materialise` writes to the paths in them
    wanted = [f"members/{m}.onnx" for m in range(count or 0)]
    need(members == wanted, "members", f"{count} files, members/0.onnx and so on")
    if config["kind"] == "compact":
        _check_compact(config.get("compact"), files)
        need(not set(members or ()) & set(files), "members", "files that are not there yet")
    else:
        need(set(members or ()) <= set(files), "members", "files of the manifest")


def _check_compact(compact: Any, files: dict[str, Any]) -> None:
    """The same for the description of how kernels are assembled."""

    def need(holds: bool, rule: str) -> None:
        _need(holds, "compact", rule, compact)

    known = {"template", "weights", "unit", "taps", "shared", "grids"}
    need(isinstance(compact, dict), "an object")
    need(set(compact) == known, f"an object of {', '.join(sorted(known))}")
    stored = [compact["template"], compact["weights"]]
    need(all(isinstance(n, str) and n in files for n in stored), "made of stored files")
    need(compact["taps"] in list(TAPS) and type(compact["shared"]) is bool, "of known taps")
    grids = compact["grids"]
    listed = isinstance(grids, list) and all(isinstance(grid, dict) for grid in grids)
    need(listed and all(isinstance(g.get("name"), str) for g in grids), "made of named grids")
    whole = [compact["unit"], *(grid.get(k) for grid in grids for k in GRID)]
    need(all(type(n) is int and n >= 1 for n in whole), "of whole sizes")


def write_records(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json`, then the manifest of all files in the folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    files = {}
    for place in sorted(folder.rglob("*")):
        if place.is_file():
            data = place.read_bytes()
            entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            files[place.relative_to(folder).as_posix()] = entry
    text = json.dumps({"schema": SCHEMA, "files": files}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if the block ends well, and is removed otherwise.

    Raises:
        BundleError: if `out` is there and not an empty folder.
    """
    out = out.resolve()  # "." has no name to write beside
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} exists; choose another place")
    folder = out.parent / f".{out.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

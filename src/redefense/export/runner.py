"""Classify images with a bundle: numpy and onnxruntime alone (pillow to read PNG and JPEG).

This file travels in every bundle as run.py. Each image is answered by a member of its own, drawn
from the operating system's entropy; which one answered is neither printed nor kept.

    python run.py IMAGE...            label of each image (.npy, or PNG and JPEG with pillow)
    python run.py --scores IMAGE...   all scores, which tell an attacker more
    python run.py --check             compare every member with the stored probes
    python run.py materialise [OUT]   write the members of a compact bundle out as a plain one

A `.npy` file holds one image (C, H, W) or several (B, C, H, W): floats in [0, 1], or bytes.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# From 1.29 on onnxruntime reports to its makers how often each session ran and how long it took,
# and a session is a member. It reads this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

SCHEMA = 1
FORMAT = "redefense-bundle"
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
"""An Ed25519 signature of the manifest may lie beside it (`export --sign`, `verify --signer`). This
file does not check it: whoever can change a bundle can change this file, too."""
TOLERANCE = {"fp32": 1e-4, "int8": 0.3}
"""Most that a member may deviate from the probes' logits: the root mean square of the differences,
as a share of that of the logits."""
MASKED = -1e4
"""What stands for a logit of -inf; lower where others are."""
AGREEMENT = {"fp32": 0.98, "int8": 0.85}
"""Least share of probes on which a member names the class that its logits name."""

Floats = NDArray[np.float32]
Trust = Callable[[Path, bytes], None]
"""Raises BundleError where a folder's manifest, as it was read, is not to be trusted."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_JSON_LIMIT = 16 * 2**20
_GRID = ("rows", "columns", "size")
_TAPS: dict[str, tuple[Callable[..., Any], float]] = {
    # how nine taps become one, and the mean square of the result for standard normal taps
    "mean": (np.mean, 1 / 9),
    "max": (np.max, 1.485013**2 + 0.357353),
    "sum": (np.sum, 9.0),
}


class BundleError(ValueError):
    """A bundle is missing, damaged, or not what its own records say."""


# PictureError, as_shown and _is_deep are those of `redefense.pictures`, which does not travel
class PictureError(ValueError):
    """A picture is not one image of 8 bits a channel; the message goes on behind its name."""


@dataclass(frozen=True)
class Bundle:
    """What a bundle says of itself, checked.

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
        """A file's content, if it is what the manifest says.

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
                f"{name} has {place.stat().st_size} bytes, the manifest says {entry['bytes']}"
            )
        data = place.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise BundleError(f"{name} has another SHA-256 than the manifest says")
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
        trust: is asked about the manifest before anything in it is believed.

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
    # exactly these: `materialise` writes where they say
    wanted = [f"members/{m}.onnx" for m in range(count or 0)]
    need(members == wanted, "members", f"{count} files, members/0.onnx and so on")
    if config["kind"] == "compact":
        _check_compact(config.get("compact"), files)
        need(not set(members or ()) & set(files), "members", "files that are not there yet")
    else:
        need(set(members or ()) <= set(files), "members", "files of the manifest")


def _check_compact(compact: Any, files: dict[str, Any]) -> None:
    """The same of what tells how kernels are put together."""

    def need(holds: bool, rule: str) -> None:
        _need(holds, "compact", rule, compact)

    known = {"template", "weights", "unit", "taps", "shared", "grids"}
    need(isinstance(compact, dict), "an object")
    need(set(compact) == known, f"an object of {', '.join(sorted(known))}")
    stored = [compact["template"], compact["weights"]]
    need(all(isinstance(n, str) and n in files for n in stored), "made of stored files")
    need(compact["taps"] in list(_TAPS) and type(compact["shared"]) is bool, "of known taps")
    grids = compact["grids"]
    listed = isinstance(grids, list) and all(isinstance(grid, dict) for grid in grids)
    need(listed and all(isinstance(g.get("name"), str) for g in grids), "made of named grids")
    whole = [compact["unit"], *(grid.get(k) for grid in grids for k in _GRID)]
    need(all(type(n) is int and n >= 1 for n in whole), "of whole sizes")


def open_session(model: bytes, *, threads: int = 0) -> Any:
    """A session of onnxruntime on the CPU.

    Raises:
        BundleError: if onnxruntime refuses the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise BundleError("members need onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its exceptions share no narrower class
        raise BundleError(f"onnxruntime refuses the member: {error}") from None


def logits_of(session: Any, images: Floats) -> Floats:
    """(B, classes) logits of one member, finite for classes that it masks with -inf."""
    (logits,) = session.run(["logits"], {"images": np.ascontiguousarray(images, np.float32)})
    logits = np.asarray(logits, np.float32)
    masked = np.isneginf(logits)
    if not masked.any() or logits.ndim != 2:
        return logits
    # what masks a row altogether is no answer, and stays so
    masked &= np.isfinite(logits).any(1, keepdims=True)
    lowest = np.where(masked, np.inf, logits).min(1, keepdims=True)
    return np.where(masked, np.minimum(2 * lowest, MASKED), logits).astype(np.float32)


def need_numbers(logits: Floats, word: str) -> None:
    """Refuse an answer that is not a number: `argmax` would name a class all the same.

    Raises:
        BundleError: naming the image by `word`.
    """
    if not np.isfinite(logits).all():
        raise BundleError(f"{word}: the answer of the member is not a number")


def draw_members(mixture: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """(count,) members drawn with probabilities `mixture` (M,) from the operating system's entropy.

    By rejection where the mixture is uniform, so that no member is favoured by even one part in
    2**63; otherwise by comparing 53 random bits with the mixture's sums.
    """
    probs = np.asarray(mixture, np.float64)
    if not (probs == probs[0]).all():
        edges = probs.cumsum()
        uniform = (_entropy(count) >> np.uint64(11)) * 2.0**-53
        drawn = np.searchsorted(edges, uniform * edges[-1], side="right")
        return np.asarray(drawn, np.int64)
    largest = np.uint64(2**64 // len(probs) * len(probs) - 1)
    kept = np.empty(0, np.uint64)
    while len(kept) < count:
        raw = _entropy(count - len(kept))
        kept = np.concatenate([kept, raw[raw <= largest]])
    return np.asarray(kept % np.uint64(len(probs)), np.int64)


def _entropy(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), np.uint64)


def classify(sessions: Sequence[Any], images: Floats, drawn: NDArray[np.int64]) -> Floats:
    """(B, classes) logits where member drawn[b] answers image b: the work of one member."""
    rows = [np.flatnonzero(drawn == m) for m in range(len(sessions))]
    parts = [
        logits_of(session, images[own])
        for session, own in zip(sessions, rows, strict=True)
        if len(own)
    ]
    order = np.concatenate(rows)
    return np.concatenate(parts)[order.argsort()]


def read_image(path: Path, shape: tuple[int, int, int]) -> Floats:
    """(B, C, H, W) floats in [0, 1] of a file; pictures are resized, arrays must fit.

    Raises:
        BundleError: naming the file and the rule it breaks.
    """
    if path.suffix.lower() == ".npy":
        try:
            array = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"{path}: {error}") from None
        images = array / np.float32(255) if array.dtype == np.uint8 else array
        images = images[None] if images.ndim == 3 else images
        if 0 in images.shape or images.shape[1:] != shape or images.dtype.kind != "f":
            raise BundleError(f"{path} holds {array.dtype} {array.shape}, not images {shape}")
    else:
        images = _picture(path, shape)
    if not ((images >= 0) & (images <= 1)).all():
        raise BundleError(f"{path} must hold finite values in [0, 1]")
    return np.asarray(images, np.float32)


def _picture(path: Path, shape: tuple[int, int, int]) -> Floats:
    channels, height, width = shape
    try:
        from PIL import Image
    except ImportError:
        raise BundleError(f"{path}: pictures need pillow; .npy files do not") from None
    if channels not in (1, 3):
        raise BundleError(f"{path}: members take {channels} channels, which pictures lack")
    try:
        with Image.open(path) as picture:
            shown = as_shown(picture)
        flat = shown.convert("L" if channels == 1 else "RGB")
        small = flat.resize((width, height), Image.Resampling.BILINEAR)
    except PictureError as error:
        raise BundleError(f"{path} {error}") from None
    except Exception as error:  # noqa: BLE001 - decoders raise many types on damaged files
        raise BundleError(f"{path}: not a readable picture ({error})") from None
    if shown.size != small.size:
        was = f"{shown.width} x {shown.height}"
        sys.stderr.write(f"run.py: {path} was {was}, resized to {width} x {height}\n")
    pixels = np.asarray(small, np.float32).reshape(height, width, channels)
    return (pixels / np.float32(255)).transpose(2, 0, 1)[None]


def as_shown(picture: Any) -> Any:
    """A picture that Pillow has opened, as viewers show it: in mode L if it is grey, else RGB.

    It is turned as its EXIF orientation says, and blended with white where it is transparent.
    Data sets, the server and the run.py of bundles all read pictures so: a network is trained,
    evaluated and asked about the same pixels.

    Raises:
        PictureError: for several frames, or more than 8 bits a channel.
    """
    from PIL import Image

    # a stereo photograph (MPO) is shown by its first picture
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        raise PictureError(f"has {picture.n_frames} frames; save the one that is meant alone")
    if picture.mode.startswith(("I", "F")) or any(_is_deep(*tile) for tile in picture.tile):
        raise PictureError("has more than 8 bits a channel; convert it to 8 bits first")
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    grey = picture.mode in ("1", "L", "LA", "La")
    picture.load()
    try:
        turn = turns.get(picture.getexif().get(274))
    except Exception:  # noqa: BLE001 - viewers ignore EXIF that cannot be read, whatever is wrong
        turn = None
    shown = picture if turn is None else picture.transpose(turn)
    if "transparency" in shown.info or shown.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        layer = shown if shown.mode == "RGBA" else shown.convert("RGBA")
        shown = Image.new("RGB", layer.size, "white")
        shown.paste(layer, mask=layer)
    mode = "L" if grey else "RGB"
    return shown if shown.mode == mode else shown.convert(mode)  # to convert is to copy


def _is_deep(decoder: str, _box: Any, _offset: int, args: Any) -> bool:
    """Whether one part of a file has more than 8 bits a channel, which Pillow would cut to 8."""
    most = args[-1] if decoder.startswith("ppm") and isinstance(args, tuple) else 255
    return ";16" in str(args) or most > 255


def deviation(found: Floats, stored: Floats) -> tuple[float, float]:
    """How far logits are from stored ones (see `TOLERANCE`), and on which share classes agree."""
    masked = (found <= MASKED) & (stored <= MASKED)  # large, they would hide what differs elsewhere
    gap, size = (np.where(masked, 0, part).astype(np.float64) for part in (found - stored, stored))
    same = float((found.argmax(-1) == stored.argmax(-1)).mean())
    return float(np.linalg.norm(gap)) / max(float(np.linalg.norm(size)), 1e-12), same


def differs(found: Floats, stored: Floats, precision: str) -> str:
    """In which respect logits are not the stored ones; empty if they are, up to the tolerance."""
    off, same = deviation(found, stored)
    most, least = TOLERANCE[precision], AGREEMENT[precision]
    if off <= most and same >= least:
        return ""
    return (
        f"deviates by {off:.2g} of its logits' size ({most:g} allowed) and names the same class on "
        f"{100 * same:.1f} % ({100 * least:g} % needed)"
    )


def check(bundle: Bundle) -> list[str]:
    """What is wrong with the members when they answer the probes; empty if nothing is."""
    images, stored = bundle.probes()
    found = (logits_of(bundle.open(m), images) for m in range(bundle.num_members))
    faults = [
        differs(mine, own, bundle.config["precision"])
        for mine, own in zip(found, stored, strict=True)
    ]
    return [f"member {m} {fault}" for m, fault in enumerate(faults) if fault]


def written(weights: dict[str, Floats], compact: dict[str, Any], m: int) -> dict[str, Floats]:
    """All tensors of member m: those that are stored, and the kernels its hypernetwork writes.

    Two linear layers turn each embedding z into a unit of n x n x 3 x 3; a kernel is a grid of
    units, in the order of reading, scaled to the variance that He's rule gives its layer.
    """
    own, writer = f"members.{m}.", f"writers.{0 if compact['shared'] else m}."
    tensors = {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}
    try:
        z = weights[f"embeddings.{m}"]
        first, first_bias = weights[writer + "first.weight"], weights[writer + "first.bias"]
        second, second_bias = weights[writer + "second.weight"], weights[writer + "second.bias"]
        n = int(compact["unit"])
        inner = (z @ first.T + first_bias).reshape(len(z), n, second.shape[1])
        units = (inner @ second.T + second_bias).reshape(len(z), n, n, 3, 3)
        start = 0
        for grid in compact["grids"]:
            rows, columns, size = (int(grid[key]) for key in _GRID)
            blocks = units[start : start + rows * columns].reshape(rows, columns, n, n, 3, 3)
            kernel = blocks.transpose(0, 2, 1, 3, 4, 5).reshape(rows * n, columns * n, 3, 3)
            start, mean_square = start + rows * columns, 1.0
            if size == 1:
                reduce, mean_square = _TAPS[compact["taps"]]
                kernel = reduce(kernel, axis=(2, 3), keepdims=True)
            scale = math.sqrt(2 / (size**2 * columns * n) / mean_square)
            tensors[grid["name"] + ".weight"] = (kernel * scale).astype(np.float32)
    except (KeyError, ValueError) as error:
        raise BundleError(f"the stored weights do not fit config.json: {error}") from None
    return tensors


def initialisers(tensors: dict[str, Floats]) -> bytes:
    """A piece of ONNX that adds weights to the graph of the file it is appended to.

    Protocol buffers merge messages that follow each other, so a template and this piece are one
    model; no package for ONNX is needed to write it.
    """
    pieces = []
    for name, array in tensors.items():
        dims = b"".join(b"\x08" + _varint(n) for n in array.shape)  # TensorProto.dims = 1
        raw = np.ascontiguousarray(array, "<f4").tobytes()
        tensor = dims + b"\x10\x01" + _field(8, name.encode()) + _field(9, raw)  # FLOAT, name, data
        pieces.append(_field(5, tensor))  # GraphProto.initializer
    return _field(7, b"".join(pieces))  # ModelProto.graph


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


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


def materialise(bundle: Bundle, out: Path) -> None:
    """Write a compact bundle out as the plain bundle `out`, which needs it no longer.

    Raises:
        BundleError: if the bundle is plain, `out` is not free, or a member is not itself.
    """
    if bundle.config["kind"] == "plain":
        raise BundleError("the members of this bundle are plain already")
    if wrong := check(bundle):
        raise BundleError(wrong[0])
    config = {key: value for key, value in bundle.config.items() if key != "compact"}
    if config.get("ensemble"):
        kept = ("model", "num_members", "width", "activation")
        config["ensemble"] = {"name": "independent", **{k: config["ensemble"][k] for k in kept}}
    left = {
        "config.json",
        bundle.config["compact"]["template"],
        bundle.config["compact"]["weights"],
    }
    with aside(out) as folder:
        (folder / "members").mkdir()
        for m, name in enumerate(config["members"]):
            (folder / name).write_bytes(bundle.member(m))
        for name in set(bundle.files) - left:
            (folder / name).write_bytes(bundle.read(name))
        write_records(folder, {**config, "kind": "plain"})


def main(words: Sequence[str], folder: Path) -> int:
    """The command line of a bundle at `folder`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description="Classify images with this bundle.")
    parser.add_argument("images", nargs="*", metavar="IMAGE | materialise [OUT]")
    parser.add_argument("--scores", action="store_true", help="print the score of every class")
    parser.add_argument("--check", action="store_true", help="compare members with the probes")
    options = parser.parse_args(words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of classes may be in any script
            stream.reconfigure(errors="backslashreplace")
    say = sys.stdout.write
    try:
        bundle = open_bundle(folder)
        if options.check:
            wrong = check(bundle)
            say("".join(f"{line}\n" for line in wrong) or "all members are themselves\n")
            return int(bool(wrong))
        if options.images[:1] == ["materialise"]:
            out = (
                Path(options.images[1])
                if options.images[1:]
                else folder.with_name(f"{folder.name}-plain")
            )
            materialise(bundle, out)
            say(f"wrote {out}\n")
            return 0
        if not options.images:
            parser.error("name an image, --check or materialise")
        sessions = [bundle.open(m) for m in range(bundle.num_members)]
        for word in options.images:
            images = read_image(Path(word), bundle.shape)
            logits = classify(sessions, images, draw_members(bundle.mixture, len(images)))
            for row in logits:
                need_numbers(row, word)
                shown = [bundle.classes[int(row.argmax())]]
                if options.scores:
                    odds = np.exp(row - row.max())
                    pairs = zip(bundle.classes, odds / odds.sum(), strict=True)
                    shown += [f"{name}={score:.4f}" for name, score in pairs]
                say("\t".join([word, *shown]) + "\n")
    except (BundleError, OSError) as error:
        sys.stderr.write(f"run.py: {error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent))

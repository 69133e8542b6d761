"""Bundles with tiny linear members, and servers in threads, for the tests of `redefense.serve`."""

import asyncio
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from starlette.types import ASGIApp

from redefense.serve.app import create_service
from redefense.serve.draws import Draw, draw_by
from redefense.serve.model import Model
from redefense.serve.process import listen, run, url_of
from redefense.serve.settings import Settings

Floats = NDArray[np.float32]
SHAPE = (1, 4, 4)
CLASSES = 10


def pictures(labels: NDArray[np.int64]) -> Floats:
    """(N, 1, 4, 4): the pixel with an image's number is bright."""
    images = np.full((len(labels), 16), 0.2, dtype=np.float32)
    images[np.arange(len(labels)), labels] = 1.0
    return images.reshape(-1, *SHAPE)


def _linear(shift: int, noise: float = 0.0) -> onnx.ModelProto:
    """Answers image k with class (k + shift) mod 10, or with noise on all logits."""
    matrix = np.zeros((16, CLASSES), dtype=np.float32)
    for k in range(CLASSES):
        matrix[k, (k + shift) % CLASSES] = 5.0
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
    ]
    if noise:
        nodes[1].output[0] = "plain"
        nodes += [
            helper.make_node("RandomNormalLike", ["plain"], ["drawn"], scale=noise),
            helper.make_node("Add", ["plain", "drawn"], ["logits"]),
        ]
    graph = helper.make_graph(
        nodes,
        "member",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", CLASSES])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def make_bundle(
    folder: Path, num_members: int = 3, mixture: list[float] | None = None, noise: float = 0.0
) -> Path:
    """Members 0 to M - 1 answer image k with classes k, k + 1, ...: they never agree."""
    (folder / "members").mkdir(parents=True)
    names = [f"members/{m}.onnx" for m in range(num_members)]
    for m, name in enumerate(names):
        (folder / name).write_bytes(_linear(m, noise).SerializeToString())
    config = {
        "schema": 1,
        "format": "redefense-bundle",
        "kind": "plain",
        "precision": "fp32",
        "num_members": num_members,
        "mixture": mixture or [1 / num_members] * num_members,
        "randomized": True,
        "classes": [f"class {k}" for k in range(CLASSES)],
        "input": {"name": "images", "shape": list(SHAPE), "dtype": "float32", "range": [0, 1]},
        "output": {"name": "logits"},
        "members": names,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    images = rng.random((64, *SHAPE), dtype=np.float32)
    logits = [images.reshape(64, -1)[:, :CLASSES] * 5.0 for _ in names]
    rolled = np.stack([np.roll(values, m, axis=1) for m, values in enumerate(logits)])
    np.savez(folder / "probes.npz", images=images, logits=rolled.astype(np.float32))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in files
    }
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "files": listed}))
    return folder


@contextlib.contextmanager
def serving(
    model: Model,
    settings: Settings,
    draw: Draw | None = None,
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> Iterator[str]:
    """A server on a free port of this machine, in a thread; its URL."""
    chosen = draw if draw is not None else draw_by(settings, model.mixture, bytes(32))
    listener = listen("127.0.0.1", 0)
    app, service = create_service(model, settings, chosen)
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def live() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(run(wrap(app), service, listener, stop))
        loop.close()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield url_of(listener)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        listener.close()

"""Small bundles for tests, and ways to spoil them with records that hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from redefense.config import override
from redefense.ensembles import Ensemble, Hyper, Independent
from redefense.export import export, runner
from redefense.export.write import About
from redefense.models import build
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.train.experiment import train

SHAPE = (1, 8, 8)
ABOUT = About(shape=SHAPE, classes=[f"digit {i}" for i in range(10)], data="digits")


def network(m: int, model: str = "mlp", width: int = 16) -> nn.Module:
    """An untrained network with batch norms, if any, that are not the identity."""
    net = build(
        model, num_classes=10, shape=SHAPE, width=width, generator=stream(0, "export", m)
    ).eval()
    rng = stream(1, "export", m)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=rng)
            module.running_var.uniform_(0.5, 2.0, generator=rng)
    return net


def plain(count: int = 3, model: str = "mlp", mixture: list[float] | None = None) -> Ensemble:
    return Independent([network(m, model) for m in range(count)], mixture)


def hyper(count: int = 3, taps: str = "mean", *, shared: bool = False) -> Hyper:
    """PS-RED on small ResNets: 3x3 and 1x1 kernels, several units each."""
    nets = [network(m, "resnet8") for m in range(count)]
    ensemble = Hyper(
        nets, unit=16, embedding=4, hidden=3, taps=taps, shared=shared, rng=stream(2, "export")
    )
    return ensemble.eval()


def bundle(ensemble: Ensemble, out: Path, **settings: Any) -> Path:
    return export(ensemble, out, ABOUT, **settings)


def trained(out: Path, *changes: str) -> Path:
    """A run of an epoch: two small members on digits."""
    own = ["epochs=1", "ensemble.model=mlp", "ensemble.num_members=2", "batch_size=256"]
    train(override(recipe("digits-vanilla"), [*own, *changes]), out, quiet=True)
    return out


def spoil(source: Path, out: Path, change: Callable[[Path], object]) -> Path:
    """A copy of a bundle, changed, with a manifest that holds again."""
    shutil.copytree(source, out)
    (out / runner.MANIFEST).unlink()
    change(out)
    runner.write_records(out, json.loads((out / "config.json").read_text()))
    return out


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def edit_member(folder: Path, m: int, change: Callable[[Any], None]) -> None:
    path = folder / f"members/{m}.onnx"
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())


def set_probes(folder: Path, images: np.ndarray, logits: np.ndarray) -> None:
    np.savez(folder / "probes.npz", images=images, logits=logits)


def torch_logits(ensemble: Ensemble, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = ensemble.member_logits(torch.from_numpy(images.copy())).numpy()
    return logits

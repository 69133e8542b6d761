"""Loss surfaces of two members around an image, over the plane spanned by their gradients.

As in Figures 1 and 2 of the paper: if both losses rise in one direction, one step increases both.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from redefense.data import train_validation
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError, DataError, need
from redefense.evaluation.member_statistics import input_gradients
from redefense.runtime.device import computing
from redefense.runtime.files import write_bytes
from redefense.threat import TINY
from redefense.train.loading import data_of, find_final, load_checkpoint, not_of
from redefense.types import correct

GRID = 31
BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Surface:
    """Cross-entropy of two members over a plane through one image.

    Attributes:
        steps: (G,) coordinates along both axes, in units of L2 distance.
        losses: (2, G, G) in nats; the first axis runs along the first member's gradient, the
            second along the part of the other's that is orthogonal to it.
        cosine: between the two gradients.
    """

    steps: NDArray[np.float64]
    losses: NDArray[np.float64]
    cosine: float


def surface(
    ensemble: Ensemble, x: Tensor, y: Tensor, *, radius: float, members: tuple[int, int] = (0, 1)
) -> Surface:
    """Losses of two members around one image (1, ch, H, W); points may lie outside the box.

    Raises:
        ConfigError: if the ensemble does not have both members, or a gradient is zero.
    """
    if max(members) >= ensemble.num_members:
        raise ConfigError(f"need members {members}, the ensemble has {ensemble.num_members}")
    grads = input_gradients(ensemble, x, y)[list(members), 0].double()
    lengths = grads.norm(dim=1)
    if float(lengths.min()) <= TINY:
        raise ConfigError(
            "a member's gradient is zero at the image, so there is no plane: choose another image"
        )
    first, other = grads / lengths[:, None]
    cosine = float(first @ other)
    rest = other - cosine * first
    # unit vectors: below 1e-6 the direction of the rest is rounding
    if float(rest.norm()) < 1e-6:
        # the gradients are parallel: any orthogonal direction completes the plane
        rest = torch.zeros_like(first)
        rest[first.abs().argmin()] = 1.0
        rest = rest - (rest @ first) * first
    second = rest / rest.norm()
    steps = torch.linspace(-radius, radius, GRID, dtype=torch.float64, device=x.device)
    moves = (steps[:, None, None] * first + steps[None, :, None] * second).flatten(0, 1)
    points = x + moves.to(x.dtype).view(-1, *x.shape[1:])
    with torch.no_grad():
        losses = [
            torch.cat(
                [
                    F.cross_entropy(
                        ensemble.logits_of(m, part), y.expand(len(part)), reduction="none"
                    )
                    for part in points.split(BATCH)
                ]
            )
            for m in members
        ]
    shape = torch.stack(losses).double().view(2, GRID, GRID)
    return Surface(steps=steps.cpu().numpy(), losses=shape.cpu().numpy(), cosine=cosine)


def surface_of(path: Path, *, image: int | None = None, data: str | None = None) -> Surface:
    """The surface at a validation image; by default the first that both classify correctly.

    Raises:
        ConfigError: if there is no such image.
        DataError: if the data are missing or not those of the run, or if no image is classified
            correctly by both members.
    """
    checkpoint = find_final(path)
    ensemble = load_checkpoint(checkpoint)
    # only `evaluate` uses the test split
    dataset, own = data_of(checkpoint, data)
    if not own:
        raise not_of(checkpoint, data)
    _, split, _ = train_validation(dataset, checkpoint.run.data.validation)
    if image is not None and not 0 <= image < len(split):
        raise ConfigError(f"--image must lie in [0, {len(split)}), got {image}")
    index = torch.arange(min(len(split), 200)) if image is None else torch.tensor([image])
    x, y = split.float(index), split.labels[index]
    if image is None:
        with torch.no_grad():
            right = correct(ensemble.member_logits(x)[:2], y).all(0).nonzero().flatten()
        if len(right) == 0:
            raise DataError(f"{path}: no validation image that both members classify correctly")
        x, y = x[right[:1]], y[right[:1]]
    # twice the L2 norm of a corner of the ball
    reach = 2 * checkpoint.run.threat.eps
    radius = reach * x[0].numel() ** 0.5 if checkpoint.run.threat.norm == "inf" else reach
    return surface(ensemble, x, y, radius=radius)


def draw(surfaces: Sequence[tuple[str, Surface]], kind: str = "svg") -> bytes:
    """One row per run: the two members' surfaces and their overlay.

    Raises:
        ConfigError: if matplotlib, of the extra `report`, is not installed.
    """
    need("matplotlib", "the landscape", extra="report")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4 * len(surfaces)), layout="constrained")
    # without pyplot, which would choose a window system
    FigureCanvasAgg(figure)
    for row, (name, found) in enumerate(surfaces):
        along, across = np.meshgrid(found.steps, found.steps, indexing="ij")
        panels = [("member 0", (0,)), ("member 1", (1,)), ("both", (0, 1))]
        for column, (title, shown) in enumerate(panels):
            axes: Any = figure.add_subplot(len(surfaces), 3, 3 * row + column + 1, projection="3d")
            for m in shown:
                axes.plot_surface(
                    along, across, found.losses[m], color=("#3b6fb6", "#d9822b")[m],
                    alpha=0.65 if len(shown) == 2 else 1.0, linewidth=0, rcount=GRID, ccount=GRID,
                )  # fmt: skip
            axes.set_title(f"{name}, {title} (gradients' cosine {found.cosine:.2f})", fontsize=9)
            axes.set_xlabel("along gradient 0 (L2)", fontsize=8)
            axes.set_ylabel("rest of gradient 1 (L2)", fontsize=8)
            axes.set_zlabel("cross-entropy", fontsize=8)
            axes.set_box_aspect(None, zoom=0.82)  # or labels are cut off
            axes.set_zlim(0, float(found.losses.max()) or 1.0)
    stream = io.BytesIO()
    # reproducible files
    with rc_context({"svg.hashsalt": "redefense"}):
        figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


@computing()
def write_landscape(
    paths: Sequence[Path], out: Path, *, image: int | None = None, data: str | None = None
) -> Path:
    """Plot the surfaces of one or several runs into an .svg or .png file.

    Args:
        paths: the runs.
        out: the file.
        image: of the validation split; by default the first that both classify correctly.
        data: where the data of the runs are now, as a specification; by default as in training.

    Raises:
        ConfigError: for another file name, or an ensemble of one member.
        DataError: if a run is missing, or its data are missing or others.
    """
    kind = out.suffix.removeprefix(".").lower()
    if kind not in ("svg", "png"):
        raise ConfigError(f"--out must name an .svg or .png file, got {out}")
    found = [surface_of(path, image=image, data=data) for path in paths]
    named = [path.resolve().name for path in paths]
    drawing = draw(list(zip(named, found, strict=True)), kind)
    write_bytes(out, drawing)
    return out

"""PS-RED's bundle: one template of the network, and the stored weights of all members."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from redefense.ensembles import Hyper
from redefense.errors import ConfigError, need
from redefense.export.graph import member_graph

TEMPLATE, WEIGHTS = "template.onnx", "weights.npz"


def write_compact(
    ensemble: Hyper, first: nn.Module, folder: Path, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Write template and weights into `folder`; return their description for `runner.written`.

    The template is member 0 (`first`, materialised) without its weights. The device adds those of
    the drawn member, with kernels generated from embeddings.

    Raises:
        ConfigError: if members differ in architecture.
    """
    for m in range(1, ensemble.num_members):
        if _outline(ensemble, m) != _outline(ensemble, 0):
            raise ConfigError(
                f"a compact bundle needs members of one architecture; 0 and {m} differ"
            )
    onnx = need("onnx")
    template = onnx.load_from_string(member_graph(first, shape))
    own = set(first.state_dict())
    # constants of the graph stay, weights come from the stored tensors
    kept = [tensor for tensor in template.graph.initializer if tensor.name not in own]
    template.graph.ClearField("initializer")
    template.graph.initializer.extend(kept)
    # equal ensembles give equal bytes
    (folder / TEMPLATE).write_bytes(template.SerializeToString(deterministic=True))
    np.savez(folder / WEIGHTS, allow_pickle=False, **stored(ensemble))
    return {"template": TEMPLATE, "weights": WEIGHTS, **layout(ensemble)}


def stored(ensemble: Hyper) -> dict[str, NDArray[np.float32]]:
    """The stored tensors of a compact ensemble by name, without counts and mixture."""
    return {
        name: value.detach().float().cpu().numpy()
        for name, value in ensemble.state_dict().items()
        if value.is_floating_point() and name != "mixture"
    }


def layout(ensemble: Hyper) -> dict[str, Any]:
    """Description of how kernels are generated from the stored tensors."""
    return {
        "unit": ensemble.unit,
        "taps": ensemble.taps,
        "shared": ensemble.shared,
        "grids": [
            {"name": g.name, "rows": g.rows, "columns": g.columns, "size": g.size}
            for g in ensemble.grids[0]
        ],
    }


def _outline(ensemble: Hyper, m: int) -> tuple[Any, ...]:
    """Names and shapes that are equal for members of one architecture."""
    net = ensemble.members[m]
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    return str(net), shapes, ensemble.grids[m]

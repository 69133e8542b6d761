"""Compares a bundle with the checkpoint that it was exported from."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redefense.errors import need
from redefense.export import runner
from redefense.export.graph import member_graph, portable, skeleton
from redefense.export.quantise import quantised
from redefense.export.runner import BundleError, Floats
from redefense.export.verify import Opened
from redefense.networks import as_logits
from redefense.train.loading import Signature, find_final, load_checkpoint

ROUNDING = 1e-5
"""Tolerance of stored weights, relative to the largest of the tensor: numpy and torch round
generated kernels differently.
"""


def compare(path: Path) -> Callable[[Opened], str]:
    """Compare a bundle with the checkpoint at `path`, for `verify --against`.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    checkpoint = find_final(path)
    ensemble, signature = load_checkpoint(checkpoint), Signature.stored(checkpoint.state)

    def look(opened: Opened) -> str:
        bundle, (images, stored) = opened.bundle, opened.probes
        facts = {
            "members": (bundle.num_members, ensemble.num_members),
            "classes": (bundle.classes, list(signature.classes)),
            "images": (bundle.shape, signature.shape),
        }
        for what, (found, wanted) in facts.items():
            if found != wanted:
                raise BundleError(f"{what}: the bundle has {found}, the checkpoint {wanted}")
        if not np.allclose(bundle.mixture, ensemble.mixture.numpy(), rtol=0, atol=1e-9):
            raise BundleError("the mixture is not that of the checkpoint")
        precision = bundle.config["precision"]
        exact = precision == "fp32"
        for m in range(ensemble.num_members):
            net = portable(ensemble.member(m))
            with torch.no_grad():
                given = torch.from_numpy(images.copy())
                logits = as_logits(net(given), given).numpy()
            # the stored probes, too: `verify` without a run relies on them
            if fault := runner.differs(stored[m], logits, "fp32"):
                raise BundleError(f"not the checkpoint's: the probes' record of member {m} {fault}")
            if fault := runner.differs(opened.answers[m], logits, precision):
                raise BundleError(f"not the checkpoint's: member {m} {fault}")
            plain = member_graph(net, signature.shape)
            if precision == "fp32":
                state = {k: v.numpy() for k, v in net.state_dict().items() if v.is_floating_point()}
                exact &= _same_weights(opened.graphs[m], state, m)
                _same_work(opened.graphs[m], plain, m, set(state))
            else:
                # any images do: their ranges of activations are not compared, and weights do not
                # depend on them
                static = bundle.config["quantisation"]["method"] == "static"
                again = quantised(plain, torch.from_numpy(images.copy()) if static else None)
                _same_integers(opened.graphs[m], again, m)
        bits = {True: "weights bit for bit", False: "weights up to rounding"}
        detail = bits[exact] if precision == "fp32" else "8-bit weights bit for bit"
        return f"all members are those of {path}: {detail}"

    return look


def _same_work(graph: bytes, wanted: bytes, m: int, weights: Collection[str] | None) -> None:
    """Check that a file's graph equals that of the network exported again.

    Equal weights and equal logits of the probes are not sufficient: they do not reveal a node that
    is triggered by one image.

    Args:
        graph: the file.
        wanted: the network exported again.
        m: the member, for the message.
        weights: names of the initializers whose values are compared elsewhere; None for all.

    Raises:
        BundleError: if they differ.
    """

    def free(tensor: Any) -> bool:
        return weights is None or tensor.name in weights

    if skeleton(graph, free) != skeleton(wanted, free):
        raise BundleError(
            f"member {m} computes something else with its weights than the checkpoint exported "
            f"anew by torch {torch.__version__}; if another one wrote the bundle, export again"
        )


def _same_integers(graph: bytes, wanted: bytes, m: int) -> None:
    """Check an 8-bit file, except ranges of activations, which depend on calibration images.

    Raises:
        BundleError: if it computes something else, or with other weights.
    """
    onnx = need("onnx")
    _same_work(graph, wanted, m, None)
    found, made = (
        {
            t.name: onnx.numpy_helper.to_array(t)
            for t in onnx.load_from_string(it).graph.initializer
            if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
        }
        for it in (graph, wanted)
    )
    for name, integers in made.items():
        if not np.array_equal(found[name], integers):
            raise BundleError(f"member {m} has other weights in {name} than the checkpoint")


def _same_weights(graph: bytes, state: dict[str, Floats], m: int) -> bool:
    """Whether the weights in a file are bit-identical to those of the network.

    Raises:
        BundleError: if one is missing or differs by more than rounding.
    """
    onnx = need("onnx")
    model = onnx.load_from_string(graph)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    if missing := set(state) - set(found):
        raise BundleError(f"member {m} lacks the weight {min(missing)}")
    for name, wanted in state.items():
        # a tensor of zeros has no scale
        scale = ROUNDING * max(float(np.abs(wanted).max()), 1e-12)
        if found[name].shape != wanted.shape or np.abs(found[name] - wanted).max() > scale:
            raise BundleError(f"member {m} has other weights in {name} than the checkpoint")
    return all(np.array_equal(found[name], wanted) for name, wanted in state.items())

"""A bundle beside the checkpoint that it was made of."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from redefense.export import runner
from redefense.export.graph import portable
from redefense.export.packages import need
from redefense.export.runner import BundleError, Floats
from redefense.train.loading import Signature, find_final, load_checkpoint

if TYPE_CHECKING:
    from redefense.export.verify import Opened

ROUNDING = 1e-5
"""Largest difference between stored weights, as a share of the largest of its tensor: kernels that
a hypernetwork writes are rounded differently by numpy and torch."""


def compare(path: Path) -> Callable[["Opened"], str]:
    """What `verify --against` looks at: the members of the checkpoint at `path`.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    checkpoint = find_final(path)
    ensemble, signature = load_checkpoint(checkpoint), Signature.stored(checkpoint.state)

    def look(opened: "Opened") -> str:
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
                logits = net(torch.from_numpy(images.copy())).numpy()
            if fault := runner.differs(stored[m], logits, "fp32"):
                raise BundleError(f"not the checkpoint's: the probes' record of member {m} {fault}")
            if fault := runner.differs(opened.answers[m], logits, precision):
                raise BundleError(f"not the checkpoint's: member {m} {fault}")
            if precision == "fp32":
                state = {k: v.numpy() for k, v in net.state_dict().items() if v.is_floating_point()}
                exact &= _same_weights(opened.graphs[m], state, m)
        bits = {True: "weights bit for bit", False: "weights up to rounding"}
        detail = bits[exact] if precision == "fp32" else "8-bit weights, the same answers"
        return f"all members are those of {path}: {detail}"

    return look


def _same_weights(graph: bytes, state: dict[str, Floats], m: int) -> bool:
    """Whether the weights in a file are those of the network to the bit.

    Raises:
        BundleError: if one is missing or differs by more than rounding.
    """
    onnx = need("onnx")
    model = onnx.load_from_string(graph)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    if missing := set(state) - set(found):
        raise BundleError(f"member {m} lacks the weight {min(missing)}")
    for name, wanted in state.items():
        scale = ROUNDING * max(float(np.abs(wanted).max()), 1e-12)
        if found[name].shape != wanted.shape or np.abs(found[name] - wanted).max() > scale:
            raise BundleError(f"member {m} has other weights in {name} than the checkpoint")
    return all(np.array_equal(found[name], wanted) for name, wanted in state.items())

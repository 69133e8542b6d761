"""Descriptions of the model in Open Inference Protocol v2 and Triton's extensions.

They contain neither the number of members nor which of them answered.
"""

import json
from typing import Any, Final

from starlette.exceptions import HTTPException

from redefense.serve.model import INPUT, Model
from redefense.serve.observe import Metrics
from redefense.serve.settings import Settings

VERSION: Final = "1"
EXTENSIONS: Final = ("binary_tensor_data", "model_configuration", "statistics")


def output_types(settings: Settings, num_classes: int) -> dict[str, tuple[str, list[int]]]:
    """Outputs by name: datatype and shape, -1 for the number of images."""
    outputs = {"label": ("BYTES", [-1]), "class_id": ("INT64", [-1]), "confidence": ("BYTES", [-1])}
    if settings.scores:
        outputs["scores"] = ("FP32", [-1, num_classes])
    if settings.research:
        outputs["member"] = ("INT64", [-1])
    return outputs


def metadata(model: Model, settings: Settings) -> dict[str, Any]:
    """The protocol's description of a model."""
    outputs = output_types(settings, len(model.classes))
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *model.shape]}],
        "outputs": [
            {"name": output, "datatype": datatype, "shape": shape}
            for output, (datatype, shape) in outputs.items()
        ],
    }


def configuration(model: Model, settings: Settings) -> dict[str, Any]:
    """The model as Triton's `ModelConfig`: shapes are those of one image, without the batch."""
    outputs = output_types(settings, len(model.classes))
    typed = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64", "FP32": "TYPE_FP32"}
    return {
        "name": model.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": settings.max_batch,
        "input": [{"name": INPUT, "data_type": "TYPE_FP32", "dims": list(model.shape)}],
        "output": [
            # a scalar per image has no dimension, but a configuration needs one
            {"name": output, "data_type": typed[datatype], "dims": shape[1:]}
            if shape[1:]
            else {
                "name": output,
                "data_type": typed[datatype],
                "dims": [1],
                "reshape": {"shape": []},
            }
            for output, (datatype, shape) in outputs.items()
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": round(settings.max_delay * 1e6)},
    }


def statistics(model: Model, metrics: Metrics) -> dict[str, Any]:
    """Counts of requests, images and batches, over all members, as in Triton.

    Durations are omitted: their sums would reveal the time of a single batch more precisely than a
    client can measure it.
    """
    done, failed = metrics.inferences()
    images, batches = metrics.classified()
    return {
        "model_stats": [
            {
                "name": model.name,
                "version": VERSION,
                "inference_count": images,
                "execution_count": batches,
                "inference_stats": {"success": {"count": done}, "fail": {"count": failed}},
            }
        ]
    }


def index(model: Model, *, leaving: bool) -> list[dict[str, str]]:
    """The one model of the repository."""
    state = "UNAVAILABLE" if leaving else "READY"
    reason = "the server is stopping" if leaving else ""
    return [{"name": model.name, "version": VERSION, "state": state, "reason": reason}]


def read_index_filter(body: bytes) -> bool:
    """Whether only ready models are requested.

    Raises:
        HTTPException: 400 if the body is not empty and no object with a boolean `ready`.
    """
    try:
        request = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        request = None
    ready = request.get("ready", False) if isinstance(request, dict) else None
    if not isinstance(ready, bool):
        raise HTTPException(400, 'the index takes no body, or {"ready": true}')
    return ready

"""Deployment: bundles of ONNX files that answer without torch, and their verification.

`export` and `load_bundle` need torch; `runner` needs only numpy and onnxruntime.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redefense.export.trained import export_run
    from redefense.export.write import About, export

_MODULES = {
    "About": "redefense.export.write",
    "export": "redefense.export.write",
    "export_run": "redefense.export.trained",
}

__all__ = ["About", "export", "export_run"]


def __getattr__(name: str) -> Any:
    # imported on first use: serving a bundle must not import torch
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'redefense.export' has no attribute {name!r}")

"""Training. The package can be called: `redefense.train(...)` is `redefense.train.api.train`.

The function and the package share their name; the one imported last would hide the other.
"""

import sys
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        from redefense.train.api import train  # needs torch

        return train(*args, **settings)


sys.modules[__name__].__class__ = _Train

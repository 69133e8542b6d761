"""The error of a bundle, and the type of its arrays."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class BundleError(ValueError):
    """A bundle is missing, damaged, or differs from its own records."""

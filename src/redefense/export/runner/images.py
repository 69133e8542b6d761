"""Images for a bundle: `.npy` files, or pictures with pillow."""

import io
import sys
from pathlib import Path

import numpy as np

from redefense.export.runner.errors import BundleError, Floats
from redefense.pictures import PictureError, as_shown


def read_image(path: Path, shape: tuple[int, int, int]) -> Floats:
    """(B, C, H, W) floats in [0, 1] of a file; pictures are resized, arrays must fit.

    Raises:
        BundleError: naming the file and the rule it breaks.
    """
    if path.suffix.lower() == ".npy":
        try:
            array = np.lib.format.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BundleError(f"{path}: {error}") from None
        images = array / np.float32(255) if array.dtype == np.uint8 else array
        images = images[None] if images.ndim == 3 else images
        if 0 in images.shape or images.shape[1:] != shape or images.dtype.kind != "f":
            raise BundleError(f"{path} holds {array.dtype} {array.shape}, not images {shape}")
    else:
        images = _picture(path, shape)
    if not ((images >= 0) & (images <= 1)).all():
        raise BundleError(f"{path} must hold finite values in [0, 1]")
    return np.asarray(images, np.float32)


def _picture(path: Path, shape: tuple[int, int, int]) -> Floats:
    channels, height, width = shape
    try:
        from PIL import Image
    except ImportError:
        raise BundleError(f"{path}: pictures need pillow; .npy files do not") from None
    if channels not in (1, 3):
        raise BundleError(f"{path}: members take {channels} channels, which pictures lack")
    try:
        with Image.open(path) as picture:
            shown = as_shown(picture)
        flat = shown.convert("L" if channels == 1 else "RGB")
        small = flat.resize((width, height), Image.Resampling.BILINEAR)
    except PictureError as error:
        raise BundleError(f"{path} {error}") from None
    except Exception as error:  # noqa: BLE001 - decoders raise many types on damaged files
        raise BundleError(f"{path}: not a readable picture ({error})") from None
    if shown.size != small.size:
        was = f"{shown.width} x {shown.height}"
        sys.stderr.write(f"run.py: {path} was {was}, resized to {width} x {height}\n")
    pixels = np.asarray(small, np.float32).reshape(height, width, channels)
    return (pixels / np.float32(255)).transpose(2, 0, 1)[None]

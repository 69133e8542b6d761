"""Decodes uploaded PNG and JPEG files of bounded size into images in [0, 1]."""

import io
from typing import Final

import numpy as np
from PIL import Image

from redefense.pictures import PictureError, as_shown
from redefense.serve.draws import Floats
from redefense.serve.protocol import refuse

FORMATS: Final = {"image/png": "PNG", "image/jpeg": "JPEG"}


def read_image(content: bytes, shape: tuple[int, int, int], max_pixels: int) -> Floats:
    """Decode a PNG or JPEG to (1, C, H, W), resized if its size differs.

    It is read by `redefense.pictures.as_shown`, like the pictures of data sets.

    Raises:
        HTTPException: 400 for other formats, 413 for too many pixels.
    """
    try:
        # reads the header only; no other decoders are run
        picture = Image.open(io.BytesIO(content), formats=list(FORMATS.values()))
        size = picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        refuse(f"a picture may have at most {max_pixels} pixels", 413)
    except Exception:  # noqa: BLE001 - decoders raise many types on damaged files
        refuse("the body is not a PNG or JPEG image")
    if size[0] * size[1] > max_pixels:
        refuse(f"a picture may have at most {max_pixels} pixels, got {size[0]} x {size[1]}", 413)
    channels, height, width = shape
    try:
        # resizing to the same size does not change a picture
        fitted = (
            as_shown(picture)
            .convert("L" if channels == 1 else "RGB")
            .resize((width, height), Image.Resampling.BILINEAR)
        )
        pixels = np.asarray(fitted, dtype=np.float32) / np.float32(255)
    except PictureError as error:
        refuse(f"the picture {error}")
    except Exception:  # noqa: BLE001 - decoders raise many types on damaged files
        refuse("the picture is damaged")
    planes = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(planes[None])

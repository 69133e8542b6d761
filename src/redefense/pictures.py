"""Pictures as viewers show them, for data sets, the server and the run.py of bundles.

`redefense.export.runner` copies this file into run.py, so it imports nothing of redefense.
"""

from typing import Any


class PictureError(ValueError):
    """A picture is not one image of 8 bits a channel; the message follows its file name."""


def as_shown(picture: Any) -> Any:
    """A picture that Pillow has opened, as viewers show it: in mode L if it is grey, else RGB.

    Its EXIF orientation is applied, and it is blended with white where it is transparent.
    Data sets, the server and the run.py of bundles all read pictures so: a network is trained,
    evaluated and queried on the same pixels.

    Raises:
        PictureError: for several frames, or more than 8 bits a channel.
    """
    from PIL import Image

    # a stereo photograph (MPO) is shown by its first picture
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        raise PictureError(f"has {picture.n_frames} frames; save the one that is meant alone")
    if picture.mode.startswith(("I", "F")) or any(_is_deep(*tile) for tile in picture.tile):
        raise PictureError("has more than 8 bits a channel; convert it to 8 bits first")
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    grey = picture.mode in ("1", "L", "LA", "La")
    picture.load()
    try:
        turn = turns.get(picture.getexif().get(274))
    except Exception:  # noqa: BLE001 - viewers ignore EXIF that cannot be read, whatever is wrong
        turn = None
    shown = picture if turn is None else picture.transpose(turn)
    if "transparency" in shown.info or shown.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        layer = shown if shown.mode == "RGBA" else shown.convert("RGBA")
        shown = Image.new("RGB", layer.size, "white")
        shown.paste(layer, mask=layer)
    mode = "L" if grey else "RGB"
    return shown if shown.mode == mode else shown.convert(mode)  # to convert is to copy


def _is_deep(decoder: str, _box: Any, _offset: int, args: Any) -> bool:
    """Whether one part of a file has more than 8 bits a channel, which Pillow would cut to 8."""
    most = args[-1] if decoder.startswith("ppm") and isinstance(args, tuple) else 255
    return ";16" in str(args) or most > 255

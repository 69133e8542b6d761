"""Pictures of several sizes as images of one size: resized, then cropped."""

from dataclasses import dataclass
from typing import Any

from redefense.errors import DataError

LARGEST = 4096
"""Largest side in pixels that can be chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """How a picture becomes an image of a data set.

    Attributes:
        resize: length in pixels of the shorter side after resizing (bilinear, antialiased; the
            longer side in proportion, rounded down), as torchvision's `Resize`; None: not resized.
        crop: side in pixels of the square cut out of the middle, as torchvision's `CenterCrop`;
            None: not cropped.
    """

    resize: int | None = None
    crop: int | None = None

    def __bool__(self) -> bool:
        return (self.resize, self.crop) != (None, None)

    def __str__(self) -> str:
        parts = []
        if self.resize is not None:
            parts.append(f"shorter side resized to {self.resize} pixels")
        if self.crop is not None:
            parts.append(f"central {self.crop} x {self.crop} pixels")
        return ", ".join(parts)

    def apply(self, picture: Any, name: str) -> Any:
        """The framed picture.

        Args:
            picture: of Pillow.
            name: for messages.

        Raises:
            DataError: if the picture is smaller than the crop.
        """
        from PIL import Image

        width, height = picture.size
        if self.resize is not None:
            short = min(width, height)
            width, height = (max(1, self.resize * side // short) for side in (width, height))
            # the longer side of a narrow strip would grow without limit
            if width * height > LARGEST**2:
                raise DataError(
                    f"{name}: {picture.size[0]}x{picture.size[1]} would be resized to "
                    f"{width}x{height}, more than {LARGEST**2} pixels"
                )
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop is not None:
            if min(width, height) < self.crop:
                raise DataError(
                    f"{name}: {width}x{height} is smaller than the crop of {self.crop}; "
                    "choose a smaller crop, or a larger resize"
                )
            left, top = (round((side - self.crop) / 2) for side in (width, height))
            picture = picture.crop((left, top, left + self.crop, top + self.crop))
        return picture


WHOLE = Framing()
"""Pictures as they are."""


def framing_of(resize: str | None, crop: str | None) -> Framing:
    """A framing from the options of a data specification.

    Raises:
        DataError: naming the option that is no whole number from 1 to `LARGEST`.
    """
    values: dict[str, int] = {}
    for option, text in (("resize", resize), ("crop", crop)):
        if text is None:
            continue
        # nine digits exceed the limit already; `int` refuses texts of thousands
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= LARGEST):
            raise DataError(
                f"{option} must be a whole number of pixels from 1 to {LARGEST}, got {text!r}"
            )
        values[option] = int(text)
    return Framing(**values)

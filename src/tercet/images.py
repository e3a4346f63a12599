"""Image files and pixels."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from tercet.errors import InputError

MODES = {1: "L", 3: "RGB"}
SIDE = 112  # pixels of a thumbnail
SMALLEST = 8  # pixels of a side: less than that shows nothing, and is most often a placeholder


class UnreadableImage(ValueError):  # noqa: N818 - it names what it is
    """An image that cannot be used; the message says why."""


def read_image_cell(cell: Any) -> bytes:
    """The bytes of a cell of an image column: ``{"bytes": ..., "path": ...}``, of which either may be None."""
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    return Path(cell["path"]).read_bytes()


@dataclass(frozen=True)
class PixelFormat:
    """How an image becomes numbers: its short side is made ``size`` S, the middle is kept; ``channels`` C is 1 (grey) or 3.

    ``mean`` and ``std`` per channel, on the scale 0 to 1, are applied by the encoder on its device: what travels is 8-bit.
    """

    size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        if self.size < SMALLEST:
            raise InputError(f"model.pixels.size={self.size}: at least {SMALLEST} pixels.")
        if self.channels not in MODES:
            raise InputError(f"model.pixels.channels={self.channels}: use 1 (grey) or 3 (red, green, blue).")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels or (name == "std" and not all(v > 0 for v in values)):
                raise InputError(
                    f"model.pixels.{name}={list(values)}: {self.channels} numbers are needed, one for each channel"
                    f"{', all above 0' if name == 'std' else ''}."
                )

    def read(self, data: bytes) -> npt.NDArray[np.uint8]:
        """A file's content to ``(C, S, S)``; raises ``BadImage``."""
        return to_array(self.fit(self.open(data)))

    def open(self, data: bytes) -> Image.Image:
        """A file's content as an upright picture of its own size in grey or RGB; raises ``BadImage``."""
        try:
            file = Image.open(io.BytesIO(data))
            # JPEG can be decoded at a fraction of its size, as long as both sides stay large enough.
            file.draft(MODES[self.channels], (2 * self.size, 2 * self.size))
            file.load()
            picture = ImageOps.exif_transpose(file)
        except Exception as error:  # decoders raise dozens of kinds
            raise UnreadableImage(f"it cannot be decoded ({type(error).__name__}: {error})") from error
        if min(picture.size) < SMALLEST:
            raise UnreadableImage(f"it has {picture.width} x {picture.height} pixels, {SMALLEST} are the least of a side")
        return _plain(picture).convert(MODES[self.channels])

    def fit(self, picture: Image.Image) -> Image.Image:
        """Short side to S, then the middle: ``S x S``."""
        if picture.size == (self.size, self.size):
            return picture
        return ImageOps.fit(picture, (self.size, self.size), Image.Resampling.BICUBIC)


def _plain(picture: Image.Image) -> Image.Image:
    """8 bits a channel, no palette, transparency on white."""
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        values = np.asarray(picture, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UnreadableImage("it holds values that are no numbers (NaN or infinite)")
        top = values.max() if picture.mode == "F" else 65535.0  # PNG and TIFF of 16 bits
        return Image.fromarray(np.clip(255 * values / max(top, 1e-12), 0, 255).astype(np.uint8))
    if picture.mode in ("P", "PA", "LA", "La", "RGBa", "RGBA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture)
    return picture.convert("RGB") if picture.mode == "LAB" else picture  # Pillow has no way from LAB to grey


def make_thumbnail(data: bytes) -> Image.Image:
    """A file's content to look at: upright, square, in colour."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return ImageOps.fit(picture, (SIDE, SIDE))


def to_array(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """A picture in grey or RGB to ``(C, height, width)``."""
    array = np.array(picture, dtype=np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))

"""Decoding of image files, and the format of pixels."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from tercet.errors import InputError, require
from tercet.paths import read_regular_file

# Of files that are taken for images, in capitals too; where a name is there with several, the first counts.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
MODES = {1: "L", 3: "RGB"}
SIDE = 112  # pixels of a thumbnail
FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"}  # others may run programs
MOST_BYTES = 1 << 28  # of a file
MOST_PIXELS = 1 << 25  # of a decoded image, as 8192 x 4096; it takes 1 to 16 bytes a pixel, and some copies
SMALLEST = 8  # pixels of a side; smaller images are mostly placeholders


class UnreadableImage(ValueError):  # noqa: N818 - the name says more than one that ends in Error
    """An image that cannot be decoded or used; the message says why."""


def read_image_cell(cell: Any) -> bytes:
    """The bytes of a cell of an image column: ``{"bytes": ..., "path": ...}``, of which either may be None.

    Raises ``OSError`` where the path names no file, ``UnreadableImage`` where it is no regular one, or the cell is empty.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UnreadableImage("the cell is empty")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    try:
        return read_regular_file(Path(cell["path"]), MOST_BYTES)
    except (InputError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnreadableImage(str(error)) from error


def open_image(data: bytes, mode: str = "RGB", size: int = 0) -> Image.Image:
    """Decode a file's content to an upright image of any mode. Raises ``UnreadableImage``, before decoding if it is too large.

    JPEG is decoded towards ``mode`` at a fraction of its size, as long as both sides keep ``size`` pixels.
    """
    try:
        file = Image.open(io.BytesIO(data))  # reads the header only
        require(file.format in FORMATS, f"it is of the format {file.format}")
        whole = file.size
        if size:
            file.draft(mode, (size, size))
        width, height = whole if file.info.get("progressive") else file.size  # progressive JPEG is held as a whole
        require(width * height <= MOST_PIXELS, f"it has {width} x {height} pixels; {MOST_PIXELS:,} are accepted")
        file.load()
        return ImageOps.exif_transpose(file)
    except Exception as error:  # decoders raise errors of many types
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise UnreadableImage(f"it cannot be decoded ({reason})") from error


@dataclass(frozen=True)
class PixelFormat:
    """The pixel format of an encoder: the short side is resized to ``size`` S and the center cropped; 1 or 3 ``channels`` C.

    ``mean`` and ``std`` per channel, on the scale 0 to 1, are applied by the encoder on its device: batches hold 8-bit pixels.

    >>> pixels = PixelFormat(size=8, channels=1, mean=[0.5], std=[0.25])
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (16, 12), "white").save(file, "png")
    >>> pixels.read(file.getvalue()).shape
    (1, 8, 8)
    """

    size: int = 224
    channels: int = 3
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        require(self.size >= SMALLEST, f"`size`={self.size}: at least {SMALLEST} pixels.")
        require(self.channels in MODES, f"`channels`={self.channels}: use 1 (gray) or 3 (red, green, blue).")
        needed = f"{self.channels} numbers are needed, one for each channel"
        require(len(self.mean) == self.channels, f"`mean`={list(self.mean)}: {needed}.")
        positive = all(value > 0 for value in self.std)
        require(len(self.std) == self.channels and positive, f"`std`={list(self.std)}: {needed}, all above 0.")

    def read(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Decode a file's content to pixels ``(C, S, S)``. Raises ``UnreadableImage``."""
        return to_array(self.fit(self.open(data)))

    def open(self, data: bytes) -> Image.Image:
        """Decode a file's content to an upright image of its own size, in gray or RGB. Raises ``UnreadableImage``."""
        picture = open_image(data, MODES[self.channels], 2 * self.size)
        if min(picture.size) < SMALLEST:
            raise UnreadableImage(f"it has {picture.width} x {picture.height} pixels, {SMALLEST} are the least of a side")
        return _to_8_bit(picture).convert(MODES[self.channels])

    def fit(self, picture: Image.Image) -> Image.Image:
        """Resize the short side to S and crop the center: ``S x S``."""
        square = (self.size, self.size)
        return picture if picture.size == square else ImageOps.fit(picture, square, Image.Resampling.BICUBIC)


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """Convert to 8 bits a channel without a palette, on a white background where it is transparent."""
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        values = np.asarray(picture, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UnreadableImage("it holds NaN or infinite values")
        top = values.max() if picture.mode == "F" else 65535.0  # PNG and TIFF of 16 bits
        return Image.fromarray(np.clip(255 * values / max(top, 1e-12), 0, 255).astype(np.uint8))
    if picture.mode in ("P", "PA", "LA", "La", "RGBa", "RGBA") or "transparency" in picture.info:
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB") if picture.mode == "LAB" else picture  # Pillow cannot convert LAB to gray


def make_thumbnail(data: bytes, side: int = SIDE) -> Image.Image:
    """A file's content as an upright, square RGB image for display."""
    return ImageOps.fit(open_image(data).convert("RGB"), (side, side))


def encode_thumbnail(data: bytes, side: int = 256) -> bytes:
    """A file's content as a new JPEG file of at most ``side`` pixels a side, for a browser. Raises ``UnreadableImage``.

    >>> file = io.BytesIO()
    >>> Image.new("RGBA", (512, 128)).save(file, "png")
    >>> Image.open(io.BytesIO(encode_thumbnail(file.getvalue()))).size
    (256, 64)
    """
    picture = _to_8_bit(open_image(data, size=2 * side)).convert("RGB")
    picture.thumbnail((side, side))
    picture.info.clear()  # nothing but the pixels goes out: JPEG would keep the comment of the file
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=90)
    return file.getvalue()


def encode_png(picture: Image.Image) -> bytes:
    """An image as the content of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def to_array(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """An image in gray or RGB to ``(C, height, width)``."""
    array = np.array(picture, dtype=np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))

"""Other looks at the same image."""

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tercet.error import InputError

QUALITY = (10, 90)  # of JPEG, as far as FaceNet's table 5 goes
ERASED = (0.02, 0.2)  # of the area (Zhong et al. 2020, arXiv:1708.04896, up to 0.4 there)
ASPECT = 3 / 4


@dataclass(frozen=True)
class Augment:
    """Random changes, in this order; 0 turns one off, but ``crop``, which is off at 1.

    ``crop``: a part of at least this share of the area, or as much of it as a square holds, stretched by no more than
    that share nor 3:4, is made S x S;
    ``flip``: the probability of a mirror image; ``colour``: brightness, contrast and (of colours) saturation change by up
    to this share; ``jpeg``: the probability of a second compression, of quality 10 to 90; ``erase``: that of a rectangle
    of noise over 2 to 20 % of the image.
    """

    flip: float
    crop: float
    colour: float
    erase: float
    jpeg: float

    def __post_init__(self) -> None:
        for name in ("flip", "colour", "erase", "jpeg"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.reader.augment.{name}={getattr(self, name)}: from 0 (off) to 1.")
        if not 0 < self.crop <= 1:
            raise InputError(f"data.reader.augment.crop={self.crop}: a share of the area, above 0, up to 1 (off).")

    def __call__(self, picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        """A picture of any size to one of ``size x size``; the same for the same state of ``rng``."""
        picture = self._cropped(picture, size, rng)
        if rng.random() < self.flip:
            picture = ImageOps.mirror(picture)
        if self.colour:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                picture = change(picture).enhance(rng.uniform(1 - self.colour, 1 + self.colour))
        if rng.random() < self.jpeg:
            picture = _compressed(picture, int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
        return _erased(picture, rng) if rng.random() < self.erase else picture

    def _cropped(self, picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        if self.crop == 1:
            return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        box = _box(picture.width, picture.height, self.crop, rng)
        return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _box(width: int, height: int, crop: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random part, no more stretched than said whatever the picture's shape: what sticks out makes it smaller."""
    area = width * height * rng.uniform(crop, 1)
    most = -math.log(max(ASPECT, crop))
    ratio = math.exp(rng.uniform(-most, most))
    wide, high = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    wide, high = min(wide, high * math.exp(most)), min(high, wide * math.exp(most))
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    return left, top, min(width, left + wide), min(height, top + high)


def _compressed(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    return Image.open(file).convert(picture.mode)


def _erased(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    area = picture.width * picture.height * rng.uniform(*ERASED)
    ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
    width = max(1, min(picture.width, round(math.sqrt(area * ratio))))
    height = max(1, min(picture.height, round(math.sqrt(area / ratio))))
    left, top = (int(rng.integers(0, most + 1)) for most in (picture.width - width, picture.height - height))
    shape = (height, width, 3) if picture.mode == "RGB" else (height, width)
    out = picture.copy()
    out.paste(Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)), (left, top))
    return out

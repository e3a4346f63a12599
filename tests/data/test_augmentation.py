"""Augmentation: each change does what it says, and depends on the generator alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tercet.data.image_transform import Augmentation, _box
from tercet.errors import InputError
from tercet.images import PixelFormat

OFF = Augmentation(flip=0, crop=1, color=0, erase=0, jpeg=0)
ALL = Augmentation(flip=0.5, crop=0.3, color=0.4, erase=0.5, jpeg=0.5)
ONE = {"flip": 1, "crop": 0.3, "color": 0.4, "erase": 1, "jpeg": 1, "cutoff": 1}


def noise(mode="RGB", width=40, height=40):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def look(augment, picture, seed=0, size=40):
    return augment(picture, size, np.random.default_rng(seed))


@given(
    flip=st.floats(0, 1), crop=st.floats(0.01, 1), color=st.floats(0, 1), erase=st.floats(0, 1), jpeg=st.floats(0, 1),
    mode=st.sampled_from(["L", "RGB"]), width=st.integers(8, 90), height=st.integers(8, 90), size=st.integers(8, 40),
    seed=st.integers(0, 1 << 62),
)  # fmt: skip
def test_any_settings_give_a_square_that_the_seed_decides(flip, crop, color, erase, jpeg, mode, width, height, size, seed):
    augment, picture = Augmentation(flip, crop, color, erase, jpeg), noise(mode, width, height)
    before = picture.tobytes()
    first, again = (look(augment, picture, seed, size) for _ in range(2))
    assert (first.size, first.mode) == ((size, size), mode)
    assert first.tobytes() == again.tobytes()
    assert picture.tobytes() == before


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_all_off_is_what_an_evaluation_sees(mode):
    channels = len(mode) if mode == "RGB" else 1
    for width, height in [(40, 40), (60, 50), (30, 90)]:
        fit = PixelFormat(40, channels, [0.5] * channels, [0.5] * channels).fit(noise(mode, width, height))
        assert look(OFF, noise(mode, width, height)).tobytes() == fit.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", ONE)
def test_each_changes_the_picture(mode, name):
    assert look(replace(OFF, **{name: ONE[name]}), noise(mode)).tobytes() != noise(mode).tobytes()


def test_seeds_differ():
    assert len({look(ALL, noise(), seed).tobytes() for seed in range(20)}) == 20


def test_a_flip_is_a_mirror_image():
    assert look(replace(OFF, flip=1), noise()).tobytes() == ImageOps.mirror(noise()).tobytes()
    seen = [look(replace(OFF, flip=0.3), noise(), seed).tobytes() != noise().tobytes() for seed in range(400)]
    assert 0.22 < np.mean(seen) < 0.38


@given(width=st.integers(8, 500), height=st.integers(8, 500), crop=st.floats(0.01, 0.999), seed=st.integers(0, 1 << 62))
def test_a_part_is_large_enough_and_little_stretched(width, height, crop, seed):
    left, top, right, bottom = _box(width, height, crop, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    stretched = (right - left) / (bottom - top)
    assert max(0.75, crop) * 0.999 <= stretched <= 1.001 / max(0.75, crop)
    square = min(width, height) ** 2 / (width * height)
    assert (right - left) * (bottom - top) / (width * height) >= 0.999 * min(crop, square * max(0.75, crop))
    if width == height:
        assert (right - left) * (bottom - top) >= 0.999 * crop * width * height


def test_parts_come_from_everywhere():
    boxes = np.array([_box(100, 100, 0.25, np.random.default_rng(seed)) for seed in range(300)])
    assert (boxes[:, :2].min(0) < 5).all() and (boxes[:, 2:].max(0) > 95).all()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert 2500 <= area.min() < 3500 and 8000 < area.max() <= 10_000


def test_colors_move_about_what_they_were():
    gray = Image.new("RGB", (40, 40), (100, 100, 100))
    means = [np.asarray(look(replace(OFF, color=0.2), gray, seed)).mean() for seed in range(200)]
    assert 79 <= min(means) < 85 and 115 < max(means) <= 121


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_rectangle_of_2_to_20_percent_is_erased(mode):
    flat = Image.new(mode, (64, 64))
    shares = []
    for seed in range(200):
        changed = np.asarray(look(replace(OFF, erase=1), flat, seed, 64)).reshape(64, 64, -1).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.mean() > 0.9  # noise is black at times
        shares.append(box.size / changed.size)
    assert 0.015 < min(shares) < 0.04 and 0.17 < max(shares) < 0.22


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_cutoff_sets_the_pixels_of_a_rectangle_to_zero(mode):
    before = np.asarray(noise(mode, 64, 64)).reshape(64, 64, -1) | 1  # no pixel is 0
    picture = Image.fromarray(before.squeeze())
    shares = []
    for seed in range(100):
        after = np.asarray(look(replace(OFF, cutoff=1), picture, seed, 64)).reshape(64, 64, -1)
        changed = (after != before).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and not after[changed].any()
        shares.append(changed.mean())
    assert 0.015 < min(shares) < 0.06 and 0.15 < max(shares) < 0.22
    seen = [look(replace(OFF, cutoff=0.3), picture, seed, 64).tobytes() != picture.tobytes() for seed in range(300)]
    assert 0.22 < np.mean(seen) < 0.38


def test_compression_costs_little_of_a_smooth_picture():
    x = np.linspace(0, math.pi, 64)
    smooth = Image.fromarray((np.outer(np.sin(x), np.sin(x)) * 255).astype(np.uint8))
    off = [np.abs(np.asarray(look(replace(OFF, jpeg=1), smooth, s, 64)).astype(int) - smooth).mean() for s in range(20)]
    assert min(off) > 0 and max(off) < 12
    assert len({round(x, 6) for x in off}) > 5  # several qualities


@pytest.mark.parametrize(
    ("key", "value"),
    [*((k, v) for k in ("flip", "color", "erase", "jpeg", "cutoff") for v in (-0.1, 1.1, math.nan)),
     ("crop", 0), ("crop", 1.1), ("crop", math.nan)],
)  # fmt: skip
def test_wrong_settings_name_their_key(key, value):
    with pytest.raises(InputError, match=rf"{key}={value}"):
        replace(OFF, **{key: value})

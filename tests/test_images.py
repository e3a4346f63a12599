"""Image files to pixels, whatever they are."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tercet.errors import InputError
from tercet.images import PixelFormat, UnreadableImage, encode_thumbnail, make_thumbnail, read_image_cell, to_array

GRAY, COLOR = PixelFormat(16, 1, (0.5,), (0.5,)), PixelFormat(16, 3, (0.5,) * 3, (0.5,) * 3)
SHADES = np.linspace(0, 255, 24 * 24).reshape(24, 24)


def encoded(picture, kind="png", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def picture(mode="RGB"):
    return Image.fromarray(SHADES.astype(np.uint8)).convert("RGB").convert(mode)


@pytest.mark.parametrize("pixels", [GRAY, COLOR])
@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "png"), ("RGB", "jpeg"), ("P", "png"), ("P", "gif"), ("LA", "png"), ("RGBA", "png"), ("RGBA", "webp"),
        ("CMYK", "jpeg"), ("CMYK", "tiff"), ("YCbCr", "tiff"), ("F", "tiff"),
    ],
)  # fmt: skip
def test_every_mode_is_the_same_picture(pixels, mode, kind):
    made = picture("L").convert("F") if mode == "F" else picture().convert(mode)
    got = pixels.read(encoded(made, kind)).astype(int)
    assert got.shape == (pixels.channels, 16, 16)
    assert np.abs(got - pixels.read(encoded(picture()))).mean() < 6


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_keep_their_range(kind):
    got = GRAY.read(encoded(Image.fromarray((SHADES * 257).astype(np.uint16)), kind)).astype(int)
    assert np.abs(got - GRAY.read(encoded(picture("L")))).max() <= 2


def test_what_is_transparent_is_white():
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert (COLOR.read(encoded(clear)) == 255).all()
    palette = Image.new("P", (20, 20), 0)
    assert (GRAY.read(encoded(palette, transparency=0)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    """The tag says how a camera was held: what is shown is the same, whichever way the bytes lie."""
    shown = picture("L")
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # of Image.Transpose, from what is shown to the bytes
    lying = shown
    for turn in turns.get(orientation, []):
        lying = lying.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (GRAY.read(encoded(lying, exif=exif)) == GRAY.read(encoded(shown))).all()


BAD = {
    "nothing": (b"", "cannot be decoded"),
    "text": (b"<html>not found</html>", "cannot be decoded"),
    "cut": (encoded(Image.effect_noise((64, 64), 50), "jpeg")[:-700], "cannot be decoded"),
    "one pixel": (encoded(Image.new("L", (1, 1))), "1 x 1 pixels, 8 are the least"),
    "a strip": (encoded(Image.new("L", (100, 7))), "100 x 7 pixels"),
    "NaN": (encoded(Image.fromarray(np.full((20, 20), np.nan, np.float32)), "tiff"), "NaN or infinite"),
    "infinite": (encoded(Image.fromarray(np.full((20, 20), np.inf, np.float32)), "tiff"), "NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("pixels", [GRAY, COLOR])
def test_what_cannot_be_used_says_why(pixels, name):
    data, why = BAD[name]
    with pytest.raises(UnreadableImage, match=why):
        pixels.read(data)


def test_lab_becomes_gray():
    profiles = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(picture(), *profiles, outputMode="LAB")
    assert GRAY.read(encoded(lab, "tiff")).shape == (1, 16, 16)


@given(width=st.integers(8, 90), height=st.integers(8, 90), size=st.integers(8, 40), data=st.data())
def test_any_shape_becomes_a_square(width, height, size, data):
    channels = data.draw(st.sampled_from([1, 3]))
    pixels = PixelFormat(size, channels, [0.5] * channels, [0.5] * channels)
    got = pixels.read(encoded(Image.new("RGB", (width, height), (9, 9, 9))))
    assert got.shape == (channels, size, size)
    assert (got == 9).all()


def test_a_picture_of_the_right_size_is_left_alone():
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert (COLOR.read(encoded(Image.fromarray(values))) == values.transpose(2, 0, 1)).all()
    assert to_array(Image.fromarray(values[..., 0])).shape == (1, 16, 16)


def test_content_is_the_bytes_or_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"there")
    assert read_image_cell({"bytes": b"here", "path": str(tmp_path / "a")}) == b"here"
    assert read_image_cell({"bytes": None, "path": str(tmp_path / "a")}) == b"there"


@pytest.mark.parametrize(
    ("name", "values"),
    [("size", (7, 1, (0,), (1,))), ("channels", (16, 2, (0,), (1,))), ("mean", (16, 3, (0,), (1,) * 3)),
     ("std", (16, 1, (0,), (0,)))],
)  # fmt: skip
def test_wrong_settings_are_named(name, values):
    with pytest.raises(InputError, match=f"^{name}="):
        PixelFormat(*values)


def huge(kind, width, height, **options):
    """A small file of very many pixels, all white."""
    return encoded(Image.new("1" if kind in ("png", "tiff") else "L", (width, height), 1), kind, **options)


@pytest.mark.parametrize(
    "data",
    [huge("png", 12_000, 12_000), huge("gif", 8_000, 8_000), huge("tiff", 20_000, 8_000, compression="group4"),
     huge("jpeg", 9_000, 9_000, progressive=True), huge("webp", 8_000, 8_000, lossless=True)],
    ids=["png", "gif", "tiff", "progressive jpeg", "webp"],
)  # fmt: skip
def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(data, monkeypatch):
    assert len(data) < 1_000_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", lambda self: pytest.fail("it was decoded"))
    for read in (COLOR.read, make_thumbnail, encode_thumbnail):
        with pytest.raises(UnreadableImage, match=r"pixels; 33,554,432 are accepted|DecompressionBombError"):
            read(data)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5000, 3), (900, 700), (256, 256)])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16", "F", "CMYK"])
def test_a_thumbnail_is_a_new_small_file(mode, size):
    data = encoded(Image.new(mode, size), "tiff" if mode in ("F", "CMYK") else "png")
    made = Image.open(io.BytesIO(encode_thumbnail(data)))
    assert (made.format, made.mode) == ("JPEG", "RGB")
    scale = min(1, 256 / max(size))
    assert max(made.size) <= 256 and np.abs(np.array(made.size) - np.maximum(1, np.array(size) * scale)).max() <= 1


def test_a_thumbnail_is_upright_and_has_nothing_but_pixels():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret"  # a quarter turn, and a description
    data = encoded(Image.new("RGB", (80, 40)), "jpeg", exif=exif, comment="secret", icc_profile=b"secret")
    made = encode_thumbnail(data)
    assert data.count(b"secret") == 3 and b"secret" not in made
    assert Image.open(io.BytesIO(made)).size == (40, 80)


def test_a_large_photograph_is_decoded_at_a_fraction():
    assert COLOR.read(encoded(Image.new("RGB", (9_000, 6_000), "white"), "jpeg")).shape == (3, 16, 16)


def test_formats_that_run_programs_are_refused():
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(id) pop\n%%EOF\n"
    with pytest.raises(UnreadableImage, match="it is of the format EPS"):
        COLOR.read(page)


def test_a_cell_that_is_empty_is_unreadable():
    for cell in (None, {"bytes": None, "path": None}):
        with pytest.raises(UnreadableImage, match="the cell is empty"):
            read_image_cell(cell)

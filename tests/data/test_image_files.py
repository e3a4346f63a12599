"""Folders, Parquet and the hub give the same images; whole labels are held out; an unreadable image is left out."""

import io
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tercet.data import Augmentation, ImageFiles, ImageTransform, PKBatchSampler
from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.training.datamodule import DataModule
from tercet.types import BatchIndices

PIXELS = PixelFormat(16, 1, [0.5], [0.25])
OFF = Augmentation(0.0, 1.0, 0.0, 0.0, 0.0)
ON = Augmentation(0.5, 0.6, 0.3, 0.5, 0.5)


def picture(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 18), dtype=np.uint8)).save(out, "png")
    return out.getvalue()


ROWS = [(f"person {i // 4}", f"{i}.png", picture(i)) for i in range(40)]


@pytest.fixture
def world(tmp_path):
    for name, file, data in ROWS:
        (tmp_path / "folder" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name / file).write_bytes(data)
    cells = {"image": [r[2] for r in ROWS], "identity": [r[0] for r in ROWS], "number": list(range(40))}
    pq.write_table(pa.table(cells), tmp_path / "bytes.parquet")
    structs = [{"bytes": r[2], "path": r[1]} for r in ROWS]
    pq.write_table(pa.table({**cells, "image": structs}), tmp_path / "struct.parquet")
    (tmp_path / "parts").mkdir()
    for part in range(2):
        pq.write_table(pa.table(cells).slice(20 * part, 20), tmp_path / "parts" / f"{part}.parquet")
    return tmp_path


def source(path, image=None, label=None, where=None, split="all", held_out=0):
    return ImageFiles(str(path), image, label, where, split, held_out)


def batch(files, rows, augment=None, seed=0):
    return ImageTransform(PIXELS, augment).load(files)[BatchIndices(rows, seed)]


def pictures(made):
    """By content, so that the order of files does not matter."""
    shown = (x.tobytes() for x in made.views[0].pixels.numpy())
    return dict(zip(shown, made.label.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["bytes.parquet", "struct.parquet", "parts"])
def test_every_form_gives_the_same_images(world, kind):
    folder, other = (batch(source(world / name), list(range(40))) for name in ("folder", kind))
    assert pictures(folder) == pictures(other)
    assert len(pictures(folder)) == 40
    assert torch.equal(other.views[0].pixels[7], torch.from_numpy(PIXELS.read(ROWS[7][2])))
    assert source(world / kind).rows().features["label"].names == sorted({r[0] for r in ROWS})


def test_hub_sets_are_read_as_files_are(world, monkeypatch):
    import datasets

    rows = datasets.Dataset(pq.read_table(world / "struct.parquet"))
    monkeypatch.setattr("tercet.data.file_reader.open_hub", lambda path, streaming: rows)
    files = source("somebody/faces")
    assert pictures(batch(files, list(range(40)))) == pictures(batch(source(world / "folder"), list(range(40))))


def test_files_without_a_folder_have_no_label_and_others_are_left_out(world, caplog):
    (world / "folder" / "lone.png").write_bytes(picture(99))
    (world / "folder" / "notes.txt").write_text("no image")
    (world / "folder" / ".hidden.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "tercet"):
        rows = source(world / "folder").rows()
    assert sorted(rows["label"])[:2] == [-1, 0]
    assert len(rows) == 41
    assert "1 of 42 files are no images" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "bytes.parquet"])
def test_whole_labels_are_held_out(world, kind):
    train, test = (source(world / kind, split=split, held_out=8).rows() for split in ("train", "test"))
    assert len(test) == 8
    assert len(train) == 32
    assert not set(train["label"]) & set(test["label"])


def test_the_order_of_rows_holds_out_the_same_labels(world):
    table = pq.read_table(world / "bytes.parquet")
    pq.write_table(table.take(pa.array(np.random.default_rng(0).permutation(40))), world / "mixed.parquet")
    first, second = (source(world / f"{n}.parquet", split="test", held_out=8).rows() for n in ("bytes", "mixed"))
    assert set(first["label"]) == set(second["label"])


def test_where_and_named_columns(world):
    rows = source(world / "bytes.parquet", "image", "identity", {"number": [4, 5, 39]}).rows()
    assert rows["label"][:] == [0, 0, 1]
    assert rows.features["label"].names == ["person 1", "person 9"]


def test_labels_of_every_type(world):
    table = pq.read_table(world / "bytes.parquet")
    for column, expected in (([7, 3] * 20, {0, 1}), ([None, "a"] * 20, {-1, 0})):
        pq.write_table(table.append_column("label", pa.array(column)), world / "typed.parquet")
        assert set(source(world / "typed.parquet").rows()["label"]) == expected
    pq.write_table(table.append_column("label", pa.array([0.5] * 40)), world / "typed.parquet")
    with pytest.raises(InputError, match=r"label=label.*0.5.*whole numbers"):
        source(world / "typed.parquet").rows()


def test_the_fingerprint_tells_contents_and_options(world):
    prints = {source(world / name).fingerprint() for name in ("folder", "bytes.parquet", "struct.parquet")}
    prints.add(source(world / "bytes.parquet", split="train", held_out=8).fingerprint())
    before = source(world / "folder").fingerprint()
    (world / "folder" / "person 0" / "new.png").write_bytes(picture(77))
    assert len({*prints, source(world / "folder").fingerprint()}) == 5
    assert before in prints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(path="nowhere"), "nowhere does not exist"),
        (dict(path="empty"), "empty: no image among 0 files"),
        (dict(path="text.txt"), "is of kind txt. For images path takes"),
        (dict(path="bytes.parquet", image="imag"), "image names 'imag'.*Did you mean 'image'"),
        (dict(path="bytes.parquet", label="identiti"), "label names 'identiti'.*Did you mean 'identity'"),
        (dict(path="bytes.parquet", image="number"), "holds int64 there; images are bytes"),
        (dict(path="bytes.parquet", split="test"), "held_out=0 leaves no test side"),
        (dict(path="bytes.parquet", split="dev"), "split=dev: choose one of train, test, all"),
        (dict(path="bytes.parquet", where={"number": 99}), "keeps no row"),
        (dict(path="plain.parquet", held_out=8), "holds out whole labels.*Name that of the labels"),
    ],
)
def test_what_cannot_be_used_is_explained(world, options, message):
    (world / "empty").mkdir()
    (world / "text.txt").write_text("a")
    pq.write_table(pq.read_table(world / "bytes.parquet", columns=["image"]), world / "plain.parquet")
    path = world / options.pop("path")
    with pytest.raises(InputError, match=message):
        source(path, **options).rows()


def test_a_draw_says_it_all(world):
    files = source(world / "folder")
    first, again, other = (batch(files, [3, 7, 11], ON, seed) for seed in (5, 5, 6))
    assert torch.equal(first.views[0].pixels, again.views[0].pixels)
    assert not torch.equal(first.views[0].pixels, other.views[0].pixels)
    assert torch.equal(batch(files, [7], ON, 5).views[0].pixels[0], first.views[0].pixels[1])
    assert first.example_id.tolist() == [3, 7, 11]
    assert torch.equal(batch(files, [3], OFF).views[0].pixels, batch(files, [3], None).views[0].pixels)


def test_bad_images_are_named_skipped_and_counted(world, caplog):
    folder = world / "folder" / "person 0"
    (folder / "0.png").write_bytes(ROWS[0][2][:60])
    Image.new("L", (1, 1)).save(folder / "1.png")
    rows = ImageTransform(PIXELS, ON).load(source(world / "folder"))
    (folder / "2.png").unlink()
    with caplog.at_level(logging.WARNING, "tercet"):
        made = rows[BatchIndices([0, 1, 2, 3], 0)]
        rows[BatchIndices([0, 1, 2], 1)]
    assert (made.num_unreadable, made.example_id.tolist(), len(made.views[0])) == (3, [3], 1)
    for name in ("0.png", "1.png: it has 1 x 1 pixels", "2.png"):
        assert name in caplog.text
    assert len(caplog.records) == 3  # each once
    nothing = rows[BatchIndices([0, 1], 0)]
    assert (len(nothing), nothing.num_unreadable, tuple(nothing.views[0].pixels.shape)) == (0, 2, (0, 1, 16, 16))


def test_workers_change_nothing(world):
    def drawn(workers):
        made = DataModule(
            source(world / "folder"), ImageTransform(PIXELS, ON),
            lambda rows, size, seed: PKBatchSampler(rows, size, seed, 2, 0), 8, workers=workers,
        )  # fmt: skip
        made.prepare_data()
        return [(b.example_id.tolist(), b.views[0].pixels) for b in made.train_dataloader()]

    for (uid, pixels), (uid_2, pixels_2) in zip(drawn(0), drawn(2), strict=True):
        assert uid == uid_2
        assert torch.equal(pixels, pixels_2)


def test_a_column_of_no_images_is_found_at_once(world):
    table = pq.read_table(world / "bytes.parquet")
    pq.write_table(table.set_column(0, "image", pa.array([b"no image"] * 40)), world / "wrong.parquet")
    with pytest.raises(InputError, match=r"None of 16 rows.*Name the column of images"):
        ImageTransform(PIXELS, None).load(source(world / "wrong.parquet"))

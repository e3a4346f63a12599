"""Folders, Parquet and the hub give the same images; whole labels are held out; an unreadable image is left out."""

import io
import logging
import os

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
    monkeypatch.setattr("tercet.data.data_path.open_hub", lambda path, streaming: rows)
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


def folder_of(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(i))
    return root


def labels_of(path, **options):
    """The label of each file of the rows, by the file's name."""
    rows = ImageFiles(str(path), **options).rows()
    names = rows.features["label"].names
    return {cell["path"].rsplit("/", 1)[1]: names[i] for cell, i in zip(rows["image"], rows["label"], strict=True)}


def test_folders_whose_names_look_like_numbers_are_labels_of_their_own(tmp_path):
    folder_of(tmp_path, "1/a.png", "01/b.png", "001/c.png", "10/d.png")
    assert labels_of(tmp_path) == {"a.png": "1", "b.png": "01", "c.png": "001", "d.png": "10"}
    assert ImageFiles(str(tmp_path)).rows().features["label"].names == ["001", "01", "1", "10"]


def test_folders_that_are_links_are_followed_inside_the_root(tmp_path, caplog):
    root = folder_of(tmp_path / "root", "P0/a.png", ".store/P1/b.png", ".store/P1/more/c.png")
    (root / "P1").symlink_to(root / ".store" / "P1")
    (root / "loop").symlink_to(root)
    (root / ".store" / "P1" / "up").symlink_to(root / ".store")
    (root / "again").symlink_to("P0")
    assert labels_of(root) == {"a.png": "P0", "b.png": "P1", "c.png": "P1/more"}
    for name in ("loop", "again"):
        assert f"{name} is a link to" in caplog.text
    (tmp_path / "alias").symlink_to(root)
    assert labels_of(tmp_path / "alias") == labels_of(root)


def test_a_link_out_of_the_root_is_named(tmp_path):
    folder_of(tmp_path, "root/P0/a.png", "elsewhere/P1/b.png")
    (tmp_path / "root" / "P1").symlink_to(tmp_path / "elsewhere" / "P1")
    with pytest.raises(InputError, match=r"the folder P1 is a link to .*elsewhere/P1, which is outside. Move or copy"):
        ImageFiles(str(tmp_path / "root"))


def test_a_link_to_nothing_and_a_folder_that_cannot_be_read_are_named(tmp_path, caplog, monkeypatch):
    folder_of(tmp_path, "P0/a.png", "P1/b.png")
    (tmp_path / "P2").symlink_to(tmp_path / "gone")
    assert labels_of(tmp_path) == {"a.png": "P0", "b.png": "P1"}
    assert "P2 is a link to nothing; left out" in caplog.text
    scan = os.scandir

    def deny(path):
        if str(path).endswith("P1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(InputError, match=r"P1 cannot be read \(Permission denied\)"):
        ImageFiles(str(tmp_path))


def test_a_person_in_two_splits_is_one(tmp_path, caplog):
    folder_of(tmp_path, "train/P0/a.png", "train/P1/b.png", "test/P0/c.png", "Val/P2/d.png")
    assert labels_of(tmp_path) == {"a.png": "P0", "b.png": "P1", "c.png": "P0", "d.png": "P2"}
    assert "holds the splits Val, test, train; all are read" in caplog.text
    assert labels_of(tmp_path, where={"split": "train"}) == {"a.png": "P0", "b.png": "P1"}
    assert labels_of(tmp_path, where={"split": ["test", "Val"]}) == {"c.png": "P0", "d.png": "P2"}
    folder_of(tmp_path, "P9/e.png")
    with pytest.raises(InputError, match=r"the label P0 is in 2 of Val, test, train, as in splits, but 'P9/e.png' is beside"):
        ImageFiles(str(tmp_path))


@pytest.mark.parametrize("parents", [("gallery", "query"), ("train2017", "val2017"), ("images/train", "images/test")])
def test_a_name_below_several_folders_that_are_not_known_as_splits_is_said(tmp_path, caplog, parents):
    folder_of(tmp_path, *(f"{parent}/P{i}/{n}{i}.png" for n, parent in enumerate(parents) for i in (0, 1)))
    assert len(set(labels_of(tmp_path).values())) == 4
    first, second = (f"{parent}/P0" for parent in sorted(parents))
    assert f"{first} and {second} are different labels, as 2 such names" in caplog.text


def test_names_that_stand_once_are_not_said(tmp_path, caplog):
    folder_of(tmp_path, "birds/crow/a.png", "birds/owl/b.png", "cats/lion/c.png")
    assert len(set(labels_of(tmp_path).values())) == 3
    assert not caplog.records


def test_a_split_may_have_no_labels(tmp_path):
    rows = ImageFiles(str(folder_of(tmp_path, "train/P0/a.png", "train/P1/b.png", "test/c.png"))).rows()
    assert sorted(rows["label"]) == [-1, 0, 1]
    assert rows.features["label"].names == ["P0", "P1"]


def test_folders_called_as_splits_can_be_labels(tmp_path):
    assert labels_of(folder_of(tmp_path / "a", "train/a.png", "test/b.png")) == {"a.png": "train", "b.png": "test"}
    assert labels_of(folder_of(tmp_path / "b", "train/fast/a.png", "bus/b.png")) == {"a.png": "train/fast", "b.png": "bus"}


def test_endings_in_capitals_are_images(tmp_path):
    names = [f"P/{i}{end}" for i, end in enumerate((".PNG", ".Jpeg", ".pgm", ".TIFF", ".txt"))]
    assert sorted(labels_of(folder_of(tmp_path, *names))) == ["0.PNG", "1.Jpeg", "2.pgm", "3.TIFF"]


def test_an_image_whose_name_is_not_utf8_is_named(tmp_path):
    folder_of(tmp_path, "P/a.png")
    try:
        (tmp_path / "P" / os.fsdecode(b"\xe9.png")).write_bytes(picture(0))
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    with pytest.raises(InputError, match=r"name of the file b'P/\\xe9.png' is not UTF-8. Rename it"):
        ImageFiles(str(tmp_path))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_bytes_of_any_type_are_images(world, kind):
    table = pq.read_table(world / "bytes.parquet", columns=["image", "identity"]).rename_columns(["scan", "identity"])
    typed = table.set_column(0, "scan", table["scan"].cast(kind)).set_column(1, "who", table["identity"].cast(pa.string_view()))
    pq.write_table(typed, world / "typed.parquet")
    files = source(world / "typed.parquet", label="who")
    assert files.image == "scan"
    assert pictures(batch(files, list(range(40)))) == pictures(batch(source(world / "folder"), list(range(40))))


def listed(path, *names):
    """A Parquet file of labeled paths of images."""
    pq.write_table(pa.table({"image": list(names), "label": [i // 2 for i in range(len(names))]}), path)
    return ImageFiles(str(path))


def test_paths_of_a_column_start_at_its_file_and_stay_below_it(tmp_path):
    root = folder_of(tmp_path / "root", "in/0.png", "in/1.png", "in/2.png", "in/3.png")
    (root / "in" / "inner.png").symlink_to(root / "in" / "0.png")
    files = listed(root / "faces.parquet", "in/0.png", str(root / "in" / "1.png"), "in/../in/2.png", "in/inner.png")
    assert len(batch(files, [0, 1, 2, 3])) == 4
    folder_of(tmp_path, "away.png", "root-2/a.png")
    (root / "link.png").symlink_to(tmp_path / "away.png")
    (root / "linked").symlink_to(tmp_path)
    outside = [
        "../away.png", str(tmp_path / "away.png"), "/etc/passwd", "/dev/zero", "link.png", "linked/away.png",
        "in/../../away.png", "a\0b", "..", "", "../root-2/a.png",
    ]  # fmt: skip
    for name in outside:
        files = listed(root / "faces.parquet", "in/0.png", name, "in/1.png", "in/2.png")
        with pytest.raises(InputError, match=r"faces.parquet: the image .* is outside of .*/root. Copy") as caught:
            files.rows()
        assert repr(name) in str(caught.value)


def test_bytes_have_names_that_are_no_paths(tmp_path):
    cells = [{"bytes": picture(i), "path": "/etc/passwd"} for i in range(4)]
    pq.write_table(pa.table({"image": cells, "label": [0, 0, 1, 1]}), tmp_path / "x.parquet")
    assert len(batch(ImageFiles(str(tmp_path / "x.parquet")), [0, 1, 2, 3])) == 4


def test_a_link_of_a_folder_that_leads_out_is_refused(tmp_path):
    folder_of(tmp_path, "root/P0/a.png", "away.png")
    (tmp_path / "root" / "P0" / "b.png").symlink_to(tmp_path / "away.png")
    with pytest.raises(InputError, match=r"the image .*P0/b.png' is outside of"):
        ImageFiles(str(tmp_path / "root")).rows()


def test_what_is_no_file_is_not_read(tmp_path, caplog):
    """A pipe would be waited for, and a device or a file of terabytes never ends."""
    root = folder_of(tmp_path, "0.png", "1.png", "2.png", "3.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    with (root / "large.png").open("wb") as file:
        file.truncate(1 << 40)
    made = batch(listed(root / "faces.parquet", "0.png", "pipe.png", "folder.png", "large.png"), [0, 1, 2, 3])
    assert (len(made), made.num_unreadable) == (1, 3)
    assert "is not a regular file" in caplog.text and "268,435,456 are accepted" in caplog.text


def test_images_that_cannot_be_decoded_are_told_before_rows_that_are_too_few(tmp_path):
    for person in ("ada", "bob"):
        (tmp_path / person).mkdir()
        for number in range(6):
            (tmp_path / person / f"{number}.png").write_bytes(b"no image")
    source = ImageFiles(str(tmp_path), held_out=500, split="train")
    with pytest.raises(InputError, match=r"12 of 12 images cannot be read, the first is .*ada/0.png: it cannot be decoded"):
        source.rows()
    for number in range(6):
        (tmp_path / "ada" / f"{number}.png").write_bytes(picture(number))
        (tmp_path / "bob" / f"{number}.png").write_bytes(picture(number))
    with pytest.raises(InputError, match="2 different values in 12 rows"):
        source.rows()

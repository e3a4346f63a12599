import io
import logging
import math

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from tercet.errors import InputError
from tercet.evaluation import EvaluatorGroup, Verification
from tercet.evaluation.verification import (
    PAIR_COLUMNS,
    FacePairs,
    Roc,
    accuracy_threshold,
    fold_thresholds,
    verification_metrics,
)
from tests.evaluation.fakes import Counted

PEOPLE = ("Ann_Lee", "Bo", "Cy_de_la_Mer", "Di", "Ed", "Flo", "Gus", "Hal")


def picture(person, number):
    """An image of a shade that tells the person, and nearly so the number."""
    shade = 25 * PEOPLE.index(person) + number
    out = io.BytesIO()
    Image.fromarray(np.full((16, 16), shade, dtype=np.uint8)).save(out, "png")
    return out.getvalue()


def faces(items):
    """Directions by shade: images of one person are near."""
    shade = torch.tensor([float(np.asarray(Image.open(io.BytesIO(item))).mean()) for item in items]) / 25
    angle = shade * math.pi / 9
    return torch.stack([angle.cos(), angle.sin()], 1) * 3


def rows():
    """Two folds of two same and two different pairs."""
    for fold, (a, b, c, d) in enumerate((PEOPLE[:4], PEOPLE[4:]), start=1):
        yield from ((fold, True, a, 1, a, 2), (fold, True, b, 1, b, 2))
        yield from ((fold, False, a, 1, c, 1), (fold, False, b, 2, d, 1))


def columns(table):
    cells = list(table)
    return {name: [row[i] for row in cells] for i, name in enumerate(PAIR_COLUMNS)}


@pytest.fixture
def world(tmp_path):
    """The same faces and pairs in every form."""
    cells = [(person, number, picture(person, number)) for person in PEOPLE for number in (1, 2)]
    table = {name: [c[i] for c in cells] for i, name in enumerate(("identity", "image_no", "image"))}
    pq.write_table(pa.table(table), tmp_path / "faces.parquet")
    for person, number, data in cells:
        (tmp_path / "lfw" / person).mkdir(parents=True, exist_ok=True)
        (tmp_path / "lfw" / person / f"{person}_{number:04d}.jpg").write_bytes(data)
    pq.write_table(pa.table(columns(rows())), tmp_path / "pairs.parquet")
    pyarrow.csv.write_csv(pa.table(columns(rows())), tmp_path / "pairs.csv")
    said = (f"{a}\t{m}\t{n}" if same else f"{a}\t{m}\t{b}\t{n}" for _, same, a, m, b, n in rows())
    (tmp_path / "pairs.txt").write_text("2\t2\n" + "\n".join(said) + "\n")
    return tmp_path


def make(world, path="faces.parquet", pairs="pairs.parquet", folds=None, name="toy"):
    return Verification(str(world / path), str(world / pairs), folds, name)


def fails(message, *args, encode=faces, **options):
    with pytest.raises(InputError, match=message):
        make(*args, **options)(encode)


@pytest.mark.parametrize("path", ["faces.parquet", "lfw"])
@pytest.mark.parametrize("pairs", ["pairs.parquet", "pairs.csv", "pairs.txt"])
def test_every_form_is_the_same(world, path, pairs):
    evaluator = make(world, path, pairs)
    assert list(zip(evaluator.protocol.fold, evaluator.protocol.same, strict=True)) == [(r[0], r[1]) for r in rows()]
    found = evaluator(faces)
    assert found["verification/toy/accuracy"] == found["verification/toy/auc"] == 1
    assert found["verification/toy/eer"] == found["verification/toy/far"] == 0
    assert found["verification/toy/val@far1e-3"] == found["verification/toy/val@far1e-3_high"] == 1
    assert found["verification/toy/val@far1e-3_low"] == pytest.approx(4 / (4 + 1.959964**2))  # Wilson 1927, all of 4


def test_names(world):
    names = ("accuracy", "threshold", "auc", "eer", "val@far1e-3", "val@far1e-3_low", "val@far1e-3_high", "far")
    assert set(make(world)(faces)) == {f"verification/toy/{name}" for name in names}


def test_a_standard_error_needs_three_folds():
    pairs = FacePairs(np.repeat([1, 2, 3], 4), np.tile([True, True, False, False], 3), *np.zeros((2, 12), int), [])
    distance = np.where(pairs.same, 0.5, 1.5)
    distance[[0, 1, 4]] = 2  # accuracies of 1/2, 3/4 and 1
    found = verification_metrics(pairs, distance, np.ones(12))
    assert found["accuracy"] == 0.75
    assert found["accuracy_sem"] == pytest.approx(0.25 / 3**0.5)
    two = FacePairs(pairs.fold[:8], pairs.same[:8], pairs.first[:8], pairs.second[:8], [])
    assert "accuracy_sem" not in verification_metrics(two, distance[:8], np.ones(8))


def test_each_image_is_encoded_once_and_read_lazily(world):
    evaluator, encode = make(world), Counted(faces)
    assert not {"protocol", "images"} & set(vars(evaluator))
    evaluator(encode)
    assert [len(set(call)) for call in encode.calls] == [len(encode.calls[0])] == [12]  # two people of a fold come once


def brute_accuracy(distance, same, t):
    return np.mean((distance <= t) == same)


@given(seed=st.integers(0, 999), count=st.integers(1, 12), values=st.sampled_from([2, 4, 1000]))
def test_no_threshold_is_better(seed, count, values):
    rng = np.random.default_rng(seed)
    distance, same = rng.integers(0, values, count) / values, rng.random(count) < 0.5
    t = accuracy_threshold(distance, same)
    grid = [*distance, distance.min() - 1, distance.max() + 1, *((distance[:, None] + distance) / 2).ravel()]
    assert brute_accuracy(distance, same, t) == max(brute_accuracy(distance, same, g) for g in grid)
    assert t not in distance
    assert t == accuracy_threshold(distance[::-1], same[::-1])


def test_the_middle_of_the_best_interval():
    assert accuracy_threshold(np.array([0.0, 1.0, 2.0]), np.array([True, False, False])) == 0.5
    # Equally good: accept none, one, or three. The median is one.
    distance, same = np.array([0.1, 0.3, 0.5, 0.7]), np.array([False, True, False, True])
    assert accuracy_threshold(distance, same) == pytest.approx(0.4)  # none, two or four; the median is two


def test_a_fold_has_no_say_in_its_own_threshold(world):
    pairs, distance = make(world).protocol, np.array([0.1, 0.2, 0.9, 1.0, 2.1, 2.2, 3.0, 3.4])
    threshold = fold_thresholds(pairs, distance)
    assert threshold[:4] == pytest.approx([2.6] * 4)
    assert threshold[4:] == pytest.approx([0.55] * 4)
    found = verification_metrics(pairs, distance, threshold)
    assert found["accuracy"] == 0.5
    assert found["threshold"] == pytest.approx((2.6 + 0.55) / 2)


@given(seed=st.integers(0, 999), count=st.integers(2, 40), values=st.sampled_from([1, 3, 1000]))
def test_the_curve_is_brute_force(seed, count, values):
    rng = np.random.default_rng(seed)
    distance, same = rng.integers(0, values, count) / values, np.arange(count) % 2 == 0
    curve = Roc.from_distances(distance, same)
    assert curve.auc() == pytest.approx(roc_auc_score(same, -distance))
    for far in (1e-3, 0.2, 0.5):
        fitting = [t for t in (-1, *distance) if (distance[~same] <= t).mean() <= far]
        expected = ((distance[same] <= max(fitting)).mean(), (distance[~same] <= max(fitting)).mean())
        assert curve.val_at(far) == pytest.approx(expected)
    line = np.interp(curve.eer(), curve.far, curve.val)  # the largest val where far repeats
    assert line >= 1 - curve.eer() - 1e-9
    assert 0 <= curve.eer() <= 1


def test_known_rates():
    assert Roc.from_distances(np.array([1.0, 3.0, 2.0, 4.0]), np.array([True, True, False, False])).eer() == 0.5
    assert Roc.from_distances(np.ones(4), np.array([True, True, False, False])).eer() == 0.5


@pytest.mark.parametrize("encode", [lambda items: torch.full((len(items), 7), 0.3), lambda items: torch.zeros(len(items), 3)])
def test_collapse_is_chance(world, encode):
    found = make(world)(encode)
    assert found["verification/toy/accuracy"] == found["verification/toy/auc"] == found["verification/toy/eer"] == 0.5
    assert found["verification/toy/val@far1e-3"] == found["verification/toy/far"] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_embeddings_that_are_no_numbers(world, bad):
    def encode(items):
        z = faces(items)
        z[3, 1] = bad
        return z

    fails(r"verification of toy: 1 of 12 embeddings are not finite", world, encode=encode)


def test_few_pairs_are_said(world, caplog):
    with caplog.at_level(logging.WARNING, "tercet"):
        make(world, name="few")(faces)
    assert "4 different pairs cannot show a FAR of 0.001" in caplog.text


@pytest.mark.parametrize("path", ["faces.parquet", "lfw"])
def test_a_missing_image_is_named_with_its_fold(world, path):
    (world / "lfw" / "Flo" / "Flo_0002.jpg").unlink()
    table = pq.read_table(world / "faces.parquet").to_pylist()
    kept = [row for row in table if (row["identity"], row["image_no"]) != ("Flo", 2)]
    pq.write_table(pa.Table.from_pylist(kept), world / "faces.parquet")
    fails(r"image 2 of Flo \(fold 2\) is missing. No pair is skipped.*folds", world, path)


def test_an_unreadable_image_is_named(world):
    (world / "lfw" / "Bo" / "Bo_0001.jpg").write_bytes(b"no image")
    fails(r"path=.*image 1 of Bo \(fold 1\) is unreadable: it cannot be decoded", world, "lfw")


def test_a_number_of_an_image_that_is_none(world):
    table = pq.read_table(world / "faces.parquet")
    numbers = pa.array([[n] for n in table["image_no"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("image_no"), "image_no", numbers), world / "faces.parquet")
    fails(r"image_no=\[1\] of .*: a whole number is needed", world)


def test_a_face_that_is_there_twice(world):
    table = pq.read_table(world / "faces.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(2, 1)]), world / "faces.parquet")
    fails("has image 1 of Bo twice", world)


@pytest.mark.parametrize("folds", [[], [1], [1, 1], ["1", "2"], "12", [1.0, 2.0]])
def test_bad_folds(world, folds):
    fails("folds=.*2 folds or more", world, folds=folds)


def test_folds_that_are_not_there(world):
    fails(r"folds=\[1, 9\].*has the folds \[1, 2\], not \[9\]", world, folds=[1, 9])


def test_only_the_chosen_folds_are_needed(world):
    more = [(r[0] + 2, r[1], f"{r[2]}x", r[3], f"{r[4]}x", r[5]) for r in rows()]
    pq.write_table(pa.table(columns([*rows(), *more])), world / "pairs.parquet")
    assert make(world, folds=[1, 2])(faces) == make(world, pairs="pairs.csv")(faces)
    fails(r"image 1 of Ann_Leex \(fold 3\), and 11 more are missing", world)


def test_a_single_fold(world):
    lines = (world / "pairs.txt").read_text().splitlines()
    (world / "pairs.txt").write_text("\n".join(["2", *lines[1:5]]))
    fails(r"has the folds \[1\]: a fold's threshold is chosen on the other folds.*folds", world, pairs="pairs.txt")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2\t2\n", "2\t3\n", "has 8 pairs; its first line promises 2 x 2 x 3"),
        ("2\t2\n", "", r"the first line is 'Ann_Lee 1 2'"),
        ("Bo\t1\t2\n", "Bo\t1\tCy\t2\n", r"pair 2: 'Bo 1 Cy 2', where a same pair, 'name n1 n2', is expected"),
        ("Ann_Lee\t1\tCy_de_la_Mer\t1", "Ann_Lee\t1\t2", "where a different pair, 'name1 n1 name2 n2', is expected"),
        ("Ann_Lee\t1\tCy_de_la_Mer\t1", "Ann_Lee\t1\tAnn_Lee\t2", "pair 3: it compares Ann_Lee and Ann_Lee as same=false"),
        ("Ann_Lee\t1\t2", "Ann_Lee\t1\t1", "pair 1: it compares an image with itself"),
        ("Ann_Lee\t1\t2", "Ann_Lee\tone\t2", "pair 1: fold=1, .*image1='one'"),
    ],
)
def test_a_bad_text_file(world, old, new, message):
    text = (world / "pairs.txt").read_text()
    assert old in text
    (world / "pairs.txt").write_text(text.replace(old, new, 1))
    fails(message, world, pairs="pairs.txt")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("fold", None, r"pair 3: fold=None"),
        ("same", None, r"pair 3: .*same=None"),
        ("identity2", "", r"pair 3: .*identity2=''.*identities are names"),
        ("same", True, r"pair 3: it compares Ann_Lee and Cy_de_la_Mer as same=true"),
    ],
)
def test_a_bad_row(world, column, value, message):
    table = columns(rows())
    table[column][2] = value
    pq.write_table(pa.table(table), world / "pairs.parquet")
    fails(message, world)


def test_a_fold_of_one_kind(world):
    pq.write_table(pa.table(columns(list(rows())[:6])), world / "pairs.parquet")
    fails("fold 2 needs pairs of both kinds", world)


def test_wrong_paths_are_found_at_once(world):
    for options, message in (
        ({"path": "nowhere"}, r"path=.*nowhere does not exist"),
        ({"path": "pairs.txt"}, r"path=.*ends in '.txt'. It takes a .parquet"),
        ({"pairs": "nowhere.txt"}, r"pairs=.*does not exist"),
        ({"pairs": "lfw"}, r"pairs=.*is a folder. It takes LFW's pairs.txt"),
        ({"name": "a/b"}, r"name='a/b'"),
    ):
        with pytest.raises(InputError, match=message):
            make(world, **options)


def test_tables_with_other_columns(world):
    fails(r"path=.*has the columns fold,.*identity, image_no, image must be there", world, path="pairs.parquet")
    fails(r"pairs=.*has the columns identity.*fold, same.*must be there once", world, pairs="faces.parquet")
    (world / "faces.parquet").write_bytes(b"PAR1")
    fails(r"path=.*cannot be read", world)


@pytest.mark.parametrize("encode", [faces, lambda items: torch.randn(len(items), 4), lambda items: torch.ones(len(items), 4)])
def test_figures_are_drawn(world, encode):
    drawn = EvaluatorGroup({"faces": make(world), "none": EvaluatorGroup({})}).figures(encode)
    assert list(drawn) == ["faces_roc", "faces_distances", "faces_errors"]
    for figure in drawn.values():
        figure.savefig(io.BytesIO(), dpi=30)
    assert "VAL" in drawn["faces_roc"].axes[0].get_ylabel()


def test_importing_the_room_does_not_load_matplotlib():
    import subprocess
    import sys

    code = "import sys, tercet.evaluation; print('matplotlib.figure' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_shared_faces(shared):
    evaluator = Verification(str(shared / "faces_lfw.parquet"), str(shared / "faces_lfw_pairs.parquet"))
    assert len(evaluator.protocol.same) == 4800
    assert np.bincount(evaluator.protocol.fold).tolist() == [0, *[600] * 8]

    def pixels(items):
        opened = (Image.open(io.BytesIO(item)).convert("L").reduce(6) for item in items)
        z = torch.stack([torch.from_numpy(np.array(p, dtype=np.float32)).flatten() for p in opened])
        return z - z.mean(1, keepdim=True)

    found = evaluator(pixels)
    assert 0.55 < found["verification/lfw/accuracy"] < 0.75
    assert found["verification/lfw/far"] == 2 / 2400


@pytest.mark.parametrize("ending", [".PNG", ".JPEG", ".pgm", ".tif"])
def test_every_ending_of_training_images_is_found(world, ending):
    for file in list((world / "lfw").rglob("*.jpg")):
        file.rename(file.with_suffix(ending))
    assert make(world, "lfw")(faces) == make(world)(faces)


def test_people_in_folders_of_splits_are_found_and_not_twice(world):
    (world / "lfw" / "Flo").rename(world / "Flo")
    for part in ("train", "test"):
        (world / "lfw" / part).mkdir()
    for i, person in enumerate(list((world / "lfw").iterdir())):
        if person.name not in ("train", "test"):
            person.rename(world / "lfw" / ("train", "test")[i % 2] / person.name)
    (world / "lfw" / ".Flo").mkdir()
    (world / "Flo").rename(world / "lfw" / ".Flo" / "Flo")
    (world / "lfw" / "test" / "Flo").symlink_to(world / "lfw" / ".Flo" / "Flo")
    assert make(world, "lfw")(faces) == make(world)(faces)
    (world / "lfw" / "Flo").mkdir()
    (world / "lfw" / "Flo" / "Flo_0001.png").write_bytes(picture("Flo", 1))
    fails(r"has image 1 of Flo twice, in .*Flo and .*Flo. Remove one", world, "lfw")

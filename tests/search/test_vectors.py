"""Files of vectors: precisions, formats, and what other programs write."""

from io import FileIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.errors import InputError
from tercet.search.vectors import PRECISIONS, VectorInfo, calibrate, open_vectors, write_vectors

ERROR = {"float32": 0.0, "float16": 1e-3, "int8": 4 / 255}  # of values from -2 to 2; half a step and rounding


@pytest.fixture
def x():
    return np.random.default_rng(0).uniform(-2, 2, (50, 12)).astype(np.float32)


def write(path, x, precision):
    calibration = calibrate([x[:20], x[20:]]) if precision == "int8" else []
    info = VectorInfo(len(x), x.shape[1], precision, "some/model", calibration=calibration)
    blocks = ((x[i : i + 20], range(i, min(i + 20, len(x))), [f"text {j}" for j in range(i, min(i + 20, len(x)))])
              for i in range(0, len(x), 20))  # fmt: skip
    write_vectors(path, info, blocks)
    return info


@pytest.mark.parametrize("ending", [".npy", ".parquet"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_vectors_come_back_in_every_precision_and_format(tmp_path, x, precision, ending):
    info = write(tmp_path / f"v{ending}", x, precision)
    found = open_vectors(tmp_path / f"v{ending}")
    assert found.info == info and found.shape == x.shape
    assert found.texts == (None if ending == ".npy" else [f"text {i}" for i in range(50)])
    if precision == "binary":
        assert found.codes.shape == (50, 2) and (found[:] == np.where(x > 0, 1, -1)).all()
    else:
        assert np.abs(found[10:30] - x[10:30]).max() <= ERROR[precision]


def test_other_programs_read_the_files(tmp_path, x):
    write(tmp_path / "v.npy", x, "float32")
    write(tmp_path / "v.parquet", x, "float32")
    assert (np.load(tmp_path / "v.npy") == x).all()
    table = pq.read_table(tmp_path / "v.parquet").to_pydict()
    assert (np.array(table["vector"], np.float32) == x).all() and table["id"] == list(range(50))


def test_files_of_other_programs_are_read(tmp_path, x):
    np.save(tmp_path / "v.npy", x.astype(np.float64))
    pq.write_table(pa.table({"text": ["a"] * 50, "vector": x.tolist()}), tmp_path / "v.parquet")
    assert np.allclose(open_vectors(tmp_path / "v.npy")[:], x)
    found = open_vectors(tmp_path / "v.parquet")
    assert np.allclose(found[:], x) and found.texts == ["a"] * 50


def test_what_is_no_file_of_vectors_is_refused(tmp_path, x):
    np.save(tmp_path / "codes.npy", np.ones((3, 4), np.uint8))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"vector": [[1.0, 2.0], [1.0]]}), tmp_path / "ragged.parquet")
    pq.write_table(pa.table({"vector": [[1.0], [2.0]], "text": ["a", None]}), tmp_path / "null.parquet")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    write(tmp_path / "mixed.npy", x, "int8")
    np.save(tmp_path / "mixed.npy", x[:10])
    for name, message in {
        "codes.npy": "holds uint8",
        "text.parquet": "a column vector of lists",
        "ragged.parquet": "of one length",
        "null.parquet": "no text",
        "cut.npy": "cannot be read",
        "objects.npy": "cannot be read",
        "mixed.npy": "described as 50 x 12",
        "none.npy": "does not exist",
        "none.txt": "ends in .npy or .parquet",
    }.items():
        with pytest.raises(InputError, match=message):
            open_vectors(tmp_path / name)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, x, monkeypatch):
    monkeypatch.setattr("tercet.search.vectors.write_text", lambda path, text: None)
    monkeypatch.setattr("pathlib.Path.open", lambda self, mode: FileIO("/dev/full", "w"))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "v.npy", np.tile(x, (100, 1)), "float32")
    assert not list(tmp_path.iterdir())


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(InputError, match="holds no value above 65504"):
        write(tmp_path / "v.npy", np.full((2, 2), 1e6, np.float32), "float16")

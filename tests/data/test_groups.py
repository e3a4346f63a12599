"""Groups: rows of a group as pairs."""

import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.text_files import Groups, TextFiles
from tercet.errors import InputError


def grouped(tmp_path, groups, **options):
    table = pa.table({"text": [f"t{i}" for i in range(len(groups))], "picture": groups})
    pq.write_table(table, tmp_path / "a.parquet")
    return Groups(TextFiles(str(tmp_path / "a.parquet"), columns=["text"], **options), "picture")


def test_members_are_paired_in_order(tmp_path, caplog):
    source = grouped(tmp_path, ["b", "a", "b", "c", "b", "a", "b", None, "a"])
    rows = source.rows()
    assert rows.column_names == [*source.columns, "label"]
    assert [(r["anchor"], r["positive"], r["label"]) for r in rows] == [("t1", "t5", 0), ("t0", "t2", 1), ("t4", "t6", 1)]
    source.rows()
    said = "1 groups of one row and 1 rows without 'picture' left out."
    assert [r.message.endswith(said) for r in caplog.records] == [True]


def test_groups_are_held_out_whole(tmp_path):
    names = [f"p{i // 3}" for i in range(60)]
    test, train = (grouped(tmp_path, names, split=s, held_out=12).rows() for s in ("test", "train"))
    assert len(test) == 4
    assert len(train) == 16
    picture = {f"t{i}": name for i, name in enumerate(names)}
    assert not {picture[t] for t in test["anchor"]} & {picture[t] for t in train["anchor"]}


def test_groups_can_be_pickled(tmp_path):
    source = grouped(tmp_path, ["a", "a"])
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    assert again.fingerprint() == source.fingerprint()


def test_what_cannot_be_grouped(tmp_path):
    with pytest.raises(InputError, match="no two rows share a value of 'picture'"):
        grouped(tmp_path, ["a", "b"]).rows()
    with pytest.raises(InputError, match=r"streaming=false"):
        grouped(tmp_path, ["a", "a"], streaming=True)
    with pytest.raises(InputError, match=r"Did you mean 'picture'\?"):
        Groups(TextFiles(str(tmp_path / "a.parquet"), columns=["text"]), "pictures")
    with pytest.raises(InputError, match="one text column"):
        Groups(TextFiles(str(tmp_path / "a.parquet"), columns=["text", "picture"]), "picture")


@pytest.mark.skipif("TERCET_DATA" not in os.environ, reason="TERCET_DATA is not set")
def test_real_captions():
    rows = Groups(TextFiles("captions_groups.parquet", columns=["text"], where={"split": "train"}), "image_id").rows()
    assert len(rows) > 57_000
    assert max(rows["label"][:]) < 29_000

"""Data sets of the hub: ids, and a quick message when the hub cannot be reached."""

import io
import time
import urllib.error
import urllib.request

import datasets
import pytest

from tercet.data import data_path
from tercet.data.text_files import TextFiles
from tercet.errors import InputError


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


def test_a_hub_that_cannot_be_reached(monkeypatch, online):
    def refuse(request, timeout):
        assert timeout <= 10
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(InputError, match=r"path=some/data: no such file.*cannot be reached \(.*no route"):
        TextFiles("some/data")


def test_offline_is_quick(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"path=some/data: no such file or folder here, and the hub gave none"):
        TextFiles("some/data")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("some/data", ("some/data", None, "train")),
        ("some/data:pair", ("some/data", "pair", "train")),
        ("some/data:pair:dev", ("some/data", "pair", "dev")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_ids_are_loaded(monkeypatch, online, path, expected, streaming):
    called = []

    def load(name, config, split, streaming):
        called.append((name, config, split))
        rows = datasets.Dataset.from_dict({"anchor": [" a", "b"], "positive": ["c", "d"], "id": [1, 2]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: io.BytesIO())
    files = TextFiles(path, streaming=streaming)
    assert list(files.rows()) == [{"anchor": "a", "positive": "c"}, {"anchor": "b", "positive": "d"}]
    assert set(called) == {expected}
    assert files.fingerprint() != TextFiles("other/data", streaming=streaming).fingerprint()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_that_does_not_know_its_columns(monkeypatch, streaming):
    cells = [{"anchor": "a", "positive": "c", "id": 1}, {"anchor": "b", "positive": "d", "id": 2}]

    def load(name, config, split, streaming):
        return datasets.IterableDataset.from_generator(lambda: iter(cells)) if streaming else datasets.Dataset.from_list(cells)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = TextFiles("some/data", label="id", streaming=streaming).rows()
    assert [(row["anchor"], row["positive"]) for row in rows] == [("a", "c"), ("b", "d")]
    assert [row["label"] for row in rows] == ([1, 2] if streaming else [0, 1])


def test_a_file_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(InputError, match=r"owner/name does not exist"):
        TextFiles("owner/name")


def test_a_file_on_the_hub_is_fetched_and_read(monkeypatch, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("a,b\none text,another text\n")
    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: io.BytesIO())
    monkeypatch.setattr(data_path, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(file))
    rows = TextFiles("hf://datasets/owner/name/folder/pairs.csv", columns=["a", "b"]).rows()
    assert rows.to_dict() == {"a": ["one text"], "b": ["another text"]}
    assert asked[0] == (("owner/name", "folder/pairs.csv"), {"repo_type": "dataset"})


def test_a_path_without_a_file_is_refused():
    with pytest.raises(InputError, match="owner/name/file is needed"):
        TextFiles("hf://datasets/owner/name")

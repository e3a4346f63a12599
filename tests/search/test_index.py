"""Indexes: exact search, measured recall, saved folders, bad input."""

import json
from io import FileIO

import numpy as np
import pytest

pytest.importorskip("faiss", reason="tercet[search] is not installed")

from tercet.errors import InputError
from tercet.evaluation.search import nearest
from tercet.search import Index
from tercet.search.index import KINDS, SIMILARITIES
from tercet.search.vectors import PRECISIONS


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((40, 20))
    return (centers[rng.integers(0, 40, 800)] + 0.6 * rng.standard_normal((800, 20))).astype(np.float32)


TEXTS = [f"text {i}" for i in range(800)]


def exact_rows(x, queries, similarity, k):
    """By numpy alone."""
    if similarity == "euclidean":
        return np.argsort(((queries[:, None] - x[None]) ** 2).sum(-1), axis=1)[:, :k]
    unit = (lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)) if similarity == "cosine" else (lambda z: z)
    return np.argsort(-unit(queries) @ unit(x).T, axis=1)[:, :k]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_exact_search_is_exact(vectors, similarity):
    index = Index.build(vectors, TEXTS, similarity=similarity)
    scores, rows = index.search(vectors[:20] + 0.1, 5)
    assert (rows == exact_rows(vectors, vectors[:20] + 0.1, similarity, 5)).all()
    assert (np.diff(scores, axis=1) <= 0).all() and index.recall == 1
    assert index.texts(rows[0]) == [f"text {row}" for row in rows[0]]


def test_it_agrees_with_the_search_of_evaluations(vectors):
    import torch

    x = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
    scores, rows = Index.build(vectors, TEXTS).search(vectors[:30], 10)
    expected, at = nearest(x[:30], x, 10)
    assert (rows == at.numpy()).all() and np.allclose(scores, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_recall_that_is_measured_holds_for_new_queries(vectors, kind, precision, tmp_path):
    index = Index.build(vectors, TEXTS, kind, precision=precision)
    assert index.recall >= 0.985  # 0.99 on the sample that the effort is chosen on
    queries = vectors[:200] + 0.05 * np.random.default_rng(1).standard_normal((200, 20)).astype(np.float32)
    scores, rows = index.search(queries, 10)
    exact = exact_rows(vectors, queries, "cosine", 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact, strict=True)]) > 0.97
    index.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    again = loaded.search(queries, 10)
    assert (again[0] == scores).all() and (again[1] == rows).all() and loaded.settings == index.settings
    Index.build(vectors, TEXTS, kind, precision=precision).save(tmp_path / "other")
    for file in (tmp_path / "index").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file.name


def test_few_rows(tmp_path):
    for kind in KINDS:
        for precision in PRECISIONS:
            index = Index.build(np.eye(3, dtype=np.float32)[:2], ["a", "b"], kind, precision=precision)
            scores, rows = index.search(np.eye(3)[:1], 100)
            assert rows.tolist()[0][0] == 0 and scores.shape == (1, 2)


def test_a_recall_that_is_not_reached_is_told(vectors, monkeypatch):
    monkeypatch.setattr("tercet.search.index.LARGEST", 1)
    assert Index.build(vectors, TEXTS, "ivf").recall < 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": np.zeros((0, 4))}, "nothing to index"),
        ({"vectors": np.zeros(4)}, "(N, D) is needed"),
        ({"vectors": np.array([[1.0, np.nan], [0.0, 1.0]]), "texts": ["a", "b"]}, "row 0 holds NaN"),
        ({"vectors": np.array([[1.0, 2.0], [np.inf, 1.0]]), "texts": ["a", "b"]}, "row 1 holds NaN or infinite"),
        ({"texts": ["a"]}, "texts: 1 for 3 vectors"),
        ({"ids": [1]}, "ids: 1 for 3 vectors"),
        ({"kind": "annoy"}, "choose one of exact, hnsw, ivf"),
        ({"similarity": "manhattan"}, "choose one of cosine"),
        ({"recall": 0.0}, "above 0, up to 1"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {"vectors": np.eye(3, dtype=np.float32), "texts": ["a", "b", "c"]}
    with pytest.raises(InputError) as error:
        Index.build(**{**good, **change})
    assert message in str(error.value)


def test_bad_queries_are_refused():
    index = Index.build(np.eye(3, dtype=np.float32), ["a", "b", "c"], model="some/model")
    for queries, k, message in (
        (np.zeros((1, 4)), 1, "have 4 columns, the vectors of the index 3. Use the model that the index was built with: some/"),
        (np.full((1, 3), np.nan), 1, "hold NaN"),
        (np.zeros(3), 1, "(Q, 3) is needed"),
        (np.zeros((1, 3)), 0, "k=0"),
    ):
        with pytest.raises(InputError) as error:
            index.search(queries, k)
        assert message in str(error.value)
    assert index.search(np.zeros((0, 3)), 2)[1].shape == (0, 2)


def test_damaged_folders_are_refused(tmp_path):
    index = Index.build(np.eye(3, dtype=np.float32), ["a", "b", "c"])
    with pytest.raises(InputError, match="is no folder of an index: it has no index"):
        Index.load(tmp_path)
    index.save(tmp_path / "index")
    with pytest.raises(InputError, match="holds something already"):
        index.save(tmp_path / "index")
    settings = tmp_path / "index" / "index.json"
    good = json.loads(settings.read_text())
    for change, message in (
        ({"version": 99}, "a later version"),
        ({"count": 2}, "do not belong together"),
        ({"x": 1}, "Build it"),
    ):
        settings.write_text(json.dumps({**good, **change}))
        with pytest.raises(InputError, match=message):
            Index.load(tmp_path / "index")
    settings.write_text(json.dumps(good))
    file = tmp_path / "index" / "index.faiss"
    for content in (file.read_bytes()[:-5], b"", b"nothing of faiss"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            Index.load(tmp_path / "index")


def test_a_full_disk_leaves_no_index(tmp_path, monkeypatch):
    index = Index.build(np.random.default_rng(0).standard_normal((2000, 64)), ["a"] * 2000)
    monkeypatch.setattr("pathlib.Path.open", lambda self, mode: FileIO("/dev/full", "w"))
    with pytest.raises(OSError, match="No space left"):
        index.save(tmp_path / "index")
    assert not list(tmp_path.iterdir())

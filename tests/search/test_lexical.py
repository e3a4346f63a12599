"""Search by words, and the fusion of ranks."""

import numpy as np
import pytest

pytest.importorskip("bm25s", reason="tercet[search] is not installed")

from tercet.errors import InputError
from tercet.search import BM25, Index, reciprocal_rank_fusion, search_hybrid

TEXTS = ["The invoice 4711 was paid.", "A dog ran home.", "Our dog is brown.", "Ärger mit der Rechnung", "x"]


def test_words_find_texts_and_survive_a_folder(tmp_path):
    words = BM25(TEXTS)
    words.save(tmp_path / "bm25")
    for engine in (words, BM25.load(tmp_path / "bm25", 5)):
        scores, rows = engine.search(["invoice 4711", "Brown DOG", "ärger", "nothing here", "", "X"], 3)
        assert rows[:, 0].tolist() == [0, 2, 3, -1, -1, 4] and rows[1].tolist() == [2, 1, -1]
        assert (np.isfinite(scores) == (rows >= 0)).all()
    with pytest.raises(InputError, match="is of 5 texts, not 6"):
        BM25.load(tmp_path / "bm25", 6)
    for texts, message in (([], "are empty"), (["...", "?!"], "hold no words")):
        with pytest.raises(InputError, match=message):
            BM25(texts)


def test_ranks_are_fused():
    scores, rows = reciprocal_rank_fusion([np.array([[3, 1, -1]]), np.array([[1, 2, 3]])], 4)
    assert rows.tolist() == [[1, 3, 2, -1]]
    assert scores[0, :3] == pytest.approx([1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62])


def test_hybrid_search_finds_what_either_finds():
    index = Index.build(np.eye(5, dtype=np.float32), TEXTS)
    _, rows = search_hybrid(index, BM25(TEXTS), np.eye(5, dtype=np.float32)[[1]], ["invoice 4711"], 2)
    assert set(rows[0].tolist()) == {0, 1}

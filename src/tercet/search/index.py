"""An index of vectors with their texts: built, saved as a folder, and searched, by FAISS."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.errors import InputError, check_choice, import_extra, refuse_damaged, require
from tercet.paths import atomic_folder, check_new_folder, locate, read_json_file

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

INDEX, ROWS, SETTINGS = "index.faiss", "rows.parquet", "index.json"  # the files of an index folder
VERSION = 1  # of the folder
KINDS = ("exact", "hnsw", "ivf")
SIMILARITIES = ("cosine", "dot", "euclidean")
BLOCK = 65_536  # rows that are added at once
SAMPLE = 500  # rows whose neighbors are compared with those of exact search
TOP = 10  # neighbors that recall counts
LARGEST = 1 << 12  # of the settings that are doubled until recall holds


@dataclass(frozen=True)
class IndexSettings:
    """What ``index.json`` holds.

    ``model`` is the name of the model that made the vectors, ``signature`` what it gives for some probes. ``effort`` is
    HNSW's efSearch or IVF's nprobe; ``recall`` the share of the exact ``TOP`` neighbors that were found with it.
    """

    kind: str
    similarity: str
    dimension: int
    count: int
    model: str = ""
    signature: list[list[float]] = field(default_factory=list)
    effort: int = 0
    recall: float = 1.0
    version: int = VERSION


class Index:
    """N vectors ``(N, D)`` with a text each, ready to be searched.

    >>> vectors = np.eye(3, dtype=np.float32)
    >>> index = Index.build(vectors, ["east", "north", "up"])
    >>> scores, rows = index.search(np.array([[1.0, 0.5, 0.0]]), k=2)
    >>> index.texts(rows[0])
    ['east', 'north']
    """

    def __init__(self, faiss_index: Any, rows: pa.Table, settings: IndexSettings) -> None:
        self.faiss, self.rows, self.settings = faiss_index, rows, settings

    @classmethod
    def build(
        cls, vectors: Any, texts: Sequence[str], kind: str = "exact", *, ids: Sequence[Any] | None = None,
        similarity: str = "cosine", model: str = "", signature: Sequence[Sequence[float]] = (), recall: float = 0.99,
        seed: int = 0,
    ) -> "Index":  # fmt: skip
        """Index ``vectors (N, D)``, an array or one that is mapped into memory, with N ``texts`` and ``ids`` (0 to N - 1).

        ``exact`` compares a query with every vector, ``hnsw`` walks a graph of neighbors, ``ivf`` looks into the nearest of
        many cells. Their effort is raised until ``recall`` of the 10 exact neighbors are found, measured with rows of the
        index as queries. A build gives the same index each time; so the graph of ``hnsw`` is built on one thread.
        """
        faiss = import_extra("faiss", "search")
        check_choice("kind", kind, KINDS)
        check_choice("similarity", similarity, SIMILARITIES)
        require(0 < recall <= 1, f"`recall`={recall}: above 0, up to 1.")
        count, dimension = _check_vectors(vectors)
        rows = _check_rows(texts, ids, count)
        settings = IndexSettings(kind, similarity, dimension, count, model, [list(map(float, z)) for z in signature])
        made = _empty(faiss, settings)
        unit = similarity == "cosine"
        if not made.is_trained:
            chosen = np.sort(np.random.default_rng(seed).permutation(count)[: 256 * made.nlist])
            made.train(_floats(vectors[chosen], unit))
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1 if kind == "hnsw" else threads)
        try:
            for start in range(0, count, BLOCK):
                made.add(_floats(vectors[start : start + BLOCK], unit))
        finally:
            faiss.omp_set_num_threads(threads)
        index = cls(made, rows, settings)
        if kind != "exact":
            index._raise_effort(vectors, recall, np.random.default_rng(seed))
        return index

    def __len__(self) -> int:
        return self.settings.count

    @property
    def kind(self) -> str:
        """``exact``, ``hnsw`` or ``ivf``."""
        return self.settings.kind

    @property
    def similarity(self) -> str:
        """``cosine``, ``dot`` or ``euclidean``, whose scores are distances below 0."""
        return self.settings.similarity

    @property
    def dim(self) -> int:
        """The number of columns D."""
        return self.settings.dimension

    @property
    def model(self) -> str:
        """The name of the model that made the vectors; empty if it was not given."""
        return self.settings.model

    @property
    def recall(self) -> float:
        """The share of the 10 exact neighbors that was found when the index was built; 1 where search is exact."""
        return self.settings.recall

    def search(self, queries: Any, k: int = TOP) -> tuple[Floats, Ints]:
        """The k nearest rows of queries ``(Q, D)``: scores ``(Q, k)``, falling, and row numbers ``(Q, k)``.

        ``k`` is at most N. Where search that is not exact finds fewer the rest is -inf and -1.
        """
        require(type(k) is int and k >= 1, f"`k`={k}: 1 or more.")
        x = np.asarray(queries, dtype=np.float32)
        require(x.ndim == 2, f"`queries` have the shape {x.shape}: (Q, {self.dim}) is needed.")
        fault = f"`queries` have {x.shape[1]} columns, the vectors of the index {self.dim}"
        require(
            x.shape[1] == self.dim, f"{fault}. Use the model that the index was built with{self.model and f': {self.model}'}."
        )
        require(np.isfinite(x).all(), "`queries` hold NaN or infinite values.")
        scores, rows = self.faiss.search(_floats(x, self.similarity == "cosine"), min(k, len(self)))
        if self.similarity == "euclidean":
            scores = -np.sqrt(np.maximum(scores, 0))
        return np.where(rows >= 0, scores, -np.inf).astype(np.float32), rows

    def texts(self, rows: Any) -> list[str]:
        """The texts of row numbers, in their order."""
        return self._cells("text", rows)

    def ids(self, rows: Any) -> list[int | str]:
        """The ids of row numbers, in their order."""
        return self._cells("id", rows)

    def _cells(self, column: str, rows: Any) -> list[Any]:
        found: list[Any] = self.rows[column].take(pa.array(np.asarray(rows, dtype=np.int64).ravel())).to_pylist()
        return found

    def save(self, folder: str | Path) -> None:
        """Write the folder of the index, which must be new or empty: whole, or not at all."""
        faiss = import_extra("faiss", "search")
        check_new_folder(Path(folder), "folder")
        with atomic_folder(Path(folder)) as made:
            with (made / INDEX).open("wb") as file:  # faiss's own writer does not tell of a full disk
                faiss.write_index(self.faiss, faiss.PyCallbackIOWriter(file.write))
            pq.write_table(self.rows, made / ROWS)
            (made / SETTINGS).write_text(json.dumps(asdict(self.settings)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Read the folder of an index; ``InputError`` where it is none, or damaged."""
        faiss = import_extra("faiss", "search")
        path, what = locate(str(folder)), f"`folder`={folder}"
        missing = [name for name in (SETTINGS, INDEX, ROWS) if not (path / name).is_file()]
        require(not missing, f"{what} is no folder of an index: {', '.join(missing)} is not there.")
        with refuse_damaged(what, "cannot be read", "Build it anew."):
            values = read_json_file(path / SETTINGS)
            version = values["version"]
            require(version <= VERSION, f"{what} was written by a later version of tercet (format {version}). Upgrade tercet.")
            settings = IndexSettings(**values)
            index = cls(faiss.read_index(str(path / INDEX)), pq.read_table(path / ROWS), settings)
            found = (index.faiss.ntotal, index.rows.num_rows, index.faiss.d)
            expected = (settings.count, settings.count, settings.dimension)
            require(found == expected, f"{what}: its files do not belong together, {found} are not {expected}. Build it anew.")
        return index

    def _raise_effort(self, vectors: Any, recall: float, rng: np.random.Generator) -> None:
        """Double the effort until ``recall`` holds on a sample of rows; keep what another sample gives."""
        tuning, test = (np.sort(rng.permutation(len(self))[:SAMPLE]) for _ in range(2))
        exact = _exact_neighbors(vectors, tuning, self.similarity)
        effort, limit = (16, LARGEST) if self.kind == "hnsw" else (1, self.faiss.nlist)
        self._set_effort(effort)
        while self._measure(vectors, tuning, exact) < recall and effort < limit:
            effort = min(2 * effort, limit)
            self._set_effort(effort)
        found = self._measure(vectors, test, _exact_neighbors(vectors, test, self.similarity))
        self.settings = replace(self.settings, effort=effort, recall=found)

    def _set_effort(self, effort: int) -> None:
        if self.kind == "hnsw":
            self.faiss.hnsw.efSearch = effort
        else:
            self.faiss.nprobe = effort

    def _measure(self, vectors: Any, sample: Ints, exact: Ints) -> float:
        found = _without_own(self.search(vectors[sample], exact.shape[1] + 1)[1], sample)
        hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
        return hits / exact.size if exact.size else 1.0


def _exact_neighbors(vectors: Any, sample: Ints, similarity: str) -> Ints:
    """The nearest rows of each row of ``sample (Q,)`` but itself: ``(Q, TOP)``, or all others of few rows."""
    faiss = import_extra("faiss", "search")
    unit, k = similarity == "cosine", min(TOP + 1, len(vectors))
    metric = faiss.METRIC_L2 if similarity == "euclidean" else faiss.METRIC_INNER_PRODUCT
    heap = faiss.ResultHeap(len(sample), k, keep_max=similarity != "euclidean")
    x = _floats(vectors[sample], unit)
    for start in range(0, len(vectors), BLOCK):
        block = _floats(vectors[start : start + BLOCK], unit)
        distances, rows = faiss.knn(x, block, min(k, len(block)), metric)
        heap.add_result(distances, rows + start)
    heap.finalize()
    return _without_own(heap.I, sample)


def _without_own(rows: Ints, own: Ints) -> Ints:
    """``(Q, k)`` to ``(Q, k - 1)``: without the own row of each, or without the last one where that is not there."""
    keep = rows != own[:, None]
    keep[keep.all(1), -1] = False
    others: Ints = rows[keep].reshape(len(rows), -1)
    return others


def _empty(faiss: Any, settings: IndexSettings) -> Any:
    """The FAISS index of these settings, without vectors."""
    cells = max(1, min(int(4 * math.sqrt(settings.count)), settings.count // 39))  # FAISS asks for 39 rows a cell to train
    structure = {"exact": "Flat", "hnsw": "HNSW32,Flat", "ivf": f"IVF{cells},Flat"}[settings.kind]
    metric = faiss.METRIC_L2 if settings.similarity == "euclidean" else faiss.METRIC_INNER_PRODUCT
    return faiss.index_factory(settings.dimension, structure, metric)


def _check_vectors(vectors: Any) -> tuple[int, int]:
    """N and D; ``InputError`` for what is no matrix of finite numbers."""
    shape = np.shape(vectors)
    require(len(shape) == 2, f"`vectors` have the shape {shape}: (N, D) is needed.")
    require(min(shape) > 0, f"`vectors` have the shape {shape}: there is nothing to index.")
    for start in range(0, shape[0], BLOCK):
        bad = ~np.isfinite(np.asarray(vectors[start : start + BLOCK], dtype=np.float32)).all(1)
        if bad.any():
            fault = f"`vectors`: row {start + int(bad.argmax())} holds NaN or infinite values"
            raise InputError(f"{fault}. The model has diverged, or overflows in half precision: encode anew.")
    return shape[0], shape[1]


def _check_rows(texts: Sequence[str], ids: Sequence[Any] | None, count: int) -> pa.Table:
    for name, values in (("texts", texts), ("ids", ids)):
        agree = values is None or len(values) == count
        require(agree, f"`{name}`: {len(values or ())} for {count} vectors. Give those that the vectors were made of.")
    return pa.table({"id": pa.array(range(count) if ids is None else ids), "text": pa.array(texts, pa.string())})


def _floats(vectors: Any, unit: bool) -> Floats:
    """``(N, D)`` in float32, contiguous, scaled to length 1 if ``unit``; a row of zeros stays."""
    x = np.ascontiguousarray(vectors, dtype=np.float32)
    if not unit:
        return x
    length: Callable[..., Any] = np.linalg.norm
    return x / np.maximum(length(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)  # type: ignore[no-any-return]

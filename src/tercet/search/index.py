"""An index of vectors with their texts: built, saved as a folder, and searched, by FAISS."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tercet.errors import InputError, check_choice, import_extra, refuse_damaged, require
from tercet.paths import atomic_folder, check_new_folder, locate, read_json_file
from tercet.search.vectors import PRECISIONS, Vectors, hash_items, write_array

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

INDEX, ROWS, SETTINGS = "index.faiss", "rows.parquet", "index.json"  # the files of an index folder
VECTORS = "vectors.npy"  # in half precision, where the index has fewer bits
VERSION = 1  # of the folder
KINDS = ("exact", "hnsw", "ivf")
SIMILARITIES = ("cosine", "dot", "euclidean")
BLOCK = 65_536  # rows that are added at once
SAMPLE = 500  # rows whose neighbors are compared with those of exact search
TOP = 10  # neighbors that recall counts
LARGEST = 1 << 11  # effort: it is doubled until recall holds
ERRORS = 3  # standard errors that recall on the sample must be above the one that is asked for
RESCORED = ("int8", "binary")  # precisions whose candidates are scored again


@dataclass(frozen=True)
class IndexSettings:
    """What ``index.json`` holds.

    ``model`` is the name of the model that made the vectors, ``signature`` what it gives for some probes, ``data`` a hash of
    what was encoded. ``effort`` scales how far is searched, see ``Index``; ``recall`` is the share of the exact ``TOP``
    neighbors that were found with it.
    """

    kind: str
    similarity: str
    dimension: int
    count: int
    model: str = ""
    signature: list[list[float]] = field(default_factory=list)
    data: str = ""
    precision: str = "float32"
    effort: int = 1
    recall: float = 1.0
    version: int = VERSION


class Index:
    """N vectors ``(N, D)`` with a text each, ready to be searched.

    ``kind``: ``exact`` compares a query with every vector, ``hnsw`` walks a graph of neighbors, ``ivf`` looks into the nearest
    of many cells. ``precision`` of the vectors in memory: float32, float16, int8 or binary, of which int8 and binary only
    find candidates, whose scores come from half-precision vectors that stay on disk. The effort multiplies the length of
    HNSW's list of candidates (16), IVF's cells (1), and of binary vectors the candidates for each result (2; int8: always 4).

    >>> vectors = np.eye(3, dtype=np.float32)
    >>> index = Index.build(vectors, ["east", "north", "up"])
    >>> scores, rows = index.search(np.array([[1.0, 0.5, 0.0]]), k=2)
    >>> index.texts(rows[0])
    ['east', 'north']
    """

    def __init__(self, faiss_index: Any, rows: pa.Table, settings: IndexSettings, vectors: Any = None) -> None:
        self.faiss, self.rows, self.settings, self.vectors = faiss_index, rows, settings, vectors
        self._set_effort(settings.effort)

    @classmethod
    def build(
        cls, vectors: Any, texts: Sequence[str], kind: str = "exact", *, ids: Sequence[Any] | None = None,
        similarity: str = "cosine", precision: str = "float32", model: str = "", signature: Sequence[Sequence[float]] = (),
        data: str = "", recall: float = 0.99, seed: int = 0,
    ) -> "Index":  # fmt: skip
        """Index ``vectors (N, D)``, an array or one that is mapped into memory, with N ``texts`` and ``ids`` (0 to N - 1).

        The effort is raised until ``recall`` of the 10 exact neighbors are found, measured with rows of the index as queries.
        A build gives the same index each time; so the graph of ``hnsw`` is built on one thread.
        """
        faiss = import_extra("faiss", "search")
        for name, value, choices in (("kind", kind, KINDS), ("similarity", similarity, SIMILARITIES),
                                     ("precision", precision, tuple(PRECISIONS))):  # fmt: skip
            check_choice(name, value, choices)
        require(0 < recall <= 1, f"`recall`={recall}: above 0, up to 1.")
        count, dimension = _check_vectors(vectors)
        rows, probes = _check_rows(texts, ids, count), [list(map(float, z)) for z in signature]
        settings = IndexSettings(kind, similarity, dimension, count, model, probes, data, precision)
        kept = np.empty((count, dimension), np.float16) if precision in RESCORED else None
        index = cls(_empty(faiss, settings), rows, settings, kept)
        if not index.faiss.is_trained:
            most = 256 * getattr(index.faiss, "nlist", 256)
            index.faiss.train(index._codes(vectors[np.sort(np.random.default_rng(seed).permutation(count)[:most])]))
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1 if kind == "hnsw" else threads)
        try:
            for start in range(0, count, BLOCK):
                x = np.asarray(vectors[start : start + BLOCK], dtype=np.float32)
                index.faiss.add(index._codes(x))
                if kept is not None:
                    kept[start : start + BLOCK] = _floats(x, similarity == "cosine")
        finally:
            faiss.omp_set_num_threads(threads)
        if kind != "exact" or precision != "float32":
            index._raise_effort(vectors, recall, np.random.default_rng(seed))
        return index

    @classmethod
    def of_vectors(
        cls, vectors: Vectors, kind: str = "exact", *, texts: Sequence[str] | None = None, ids: Sequence[Any] | None = None,
        similarity: str | None = None, precision: str = "float32", recall: float = 0.99,
    ) -> "Index":  # fmt: skip
        """Index what ``open_vectors`` has read; a file without texts needs those that were encoded, which are compared."""
        info = vectors.info
        chosen = texts if texts is not None else vectors.texts
        if chosen is None:
            advice = "Give the texts that were encoded, or encode to .parquet, which keeps them"
            raise InputError(f"`texts` must be given: the file of vectors has none. {advice}.")
        if texts is not None and info.data and not info.left_out and len(texts) == len(vectors):
            same = hash_items(texts)[1] == info.data
            require(same, "`texts`: not those that the vectors were made of, or in another order. Give the same data.")
        return cls.build(
            vectors, chosen, kind, ids=ids if ids is not None else vectors.ids, similarity=similarity or info.similarity,
            precision=precision, model=info.model, signature=info.signature, data=info.data, recall=recall,
        )  # fmt: skip

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
        advice = f"Use the model that the index was built with{self.model and f': {self.model}'}."
        require(x.shape[1] == self.dim, f"{fault}. {advice}")
        require(np.isfinite(x).all(), "`queries` hold NaN or infinite values.")
        k = min(k, len(self))
        candidates = {"int8": 4, "binary": 2 * self.settings.effort}.get(self.settings.precision, 1)
        scores, rows = self.faiss.search(self._codes(x), min(len(self), candidates * k))
        if self.vectors is not None:
            return self._rescore(_floats(x, self.similarity == "cosine"), rows, k)
        if self.similarity == "euclidean":
            scores = -np.sqrt(np.maximum(scores, 0))
        return np.where(rows >= 0, scores, -np.inf).astype(np.float32), rows

    def _codes(self, x: Any) -> Any:
        """``(n, D)`` as FAISS takes them."""
        floats = _floats(x, self.similarity == "cosine")
        return np.packbits(floats > 0, axis=1) if self.settings.precision == "binary" else floats

    def _rescore(self, x: Floats, rows: Ints, k: int) -> tuple[Floats, Ints]:
        """The k best of the candidates ``rows (Q, C)`` by the vectors in half precision."""
        scores = np.empty(rows.shape, np.float32)
        for i, candidates in enumerate(rows):
            z = np.asarray(self.vectors[np.maximum(candidates, 0)], dtype=np.float32)
            scores[i] = -np.linalg.norm(z - x[i], axis=1) if self.similarity == "euclidean" else z @ x[i]
        scores[rows < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def texts(self, rows: Any) -> list[str]:
        """The texts of row numbers, in their order."""
        return self._cells("text", rows)

    def ids(self, rows: Any) -> list[int | str]:
        """The ids of row numbers, in their order."""
        return self._cells("id", rows)

    def _cells(self, column: str, rows: Any) -> list[Any]:
        return cast(list[Any], self.rows[column].take(pa.array(np.asarray(rows, dtype=np.int64).ravel())).to_pylist())

    def save(self, folder: str | Path) -> None:
        """Write the folder of the index, which must be new or empty: whole, or not at all."""
        faiss = import_extra("faiss", "search")
        check_new_folder(Path(folder), "folder")
        with atomic_folder(Path(folder)) as made:
            with (made / INDEX).open("wb") as file:  # faiss's own writer does not tell of a full disk
                write = faiss.write_index_binary if self.settings.precision == "binary" else faiss.write_index
                write(self.faiss, faiss.PyCallbackIOWriter(file.write))
            if self.vectors is not None:
                write_array(made / VECTORS, self.vectors.dtype, self.vectors.shape, [self.vectors])
            pq.write_table(self.rows, made / ROWS)
            (made / SETTINGS).write_text(json.dumps(asdict(self.settings)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Read the folder of an index; ``InputError`` where it is none, or damaged."""
        faiss = import_extra("faiss", "search")
        path, what = locate(str(folder)), f"`folder`={folder}"
        missing = [name for name in (SETTINGS, INDEX, ROWS) if not (path / name).is_file()]
        require(not missing, f"{what} is no folder of an index: it has no {', no '.join(missing)}.")
        with refuse_damaged(what, "cannot be read", "Build it anew."):
            values = read_json_file(path / SETTINGS)
            version = values["version"]
            require(version <= VERSION, f"{what} was written by a later version of tercet (format {version}). Upgrade tercet.")
            settings = IndexSettings(**values)
            read = faiss.read_index_binary if settings.precision == "binary" else faiss.read_index
            kept = np.load(path / VECTORS, mmap_mode="r") if settings.precision in RESCORED else None
            index = cls(read(str(path / INDEX)), pq.read_table(path / ROWS), settings, kept)
            counts = {index.faiss.ntotal, index.rows.num_rows, settings.count, settings.count if kept is None else len(kept)}
            require(len(counts) == 1, f"{what}: its files do not belong together, of {counts} rows. Build it anew.")
        return index

    def _raise_effort(self, vectors: Any, recall: float, rng: np.random.Generator) -> None:
        """Double the effort until ``recall`` surely holds on a sample of rows; keep what another sample gives."""
        tuning, test = (np.sort(rng.permutation(len(self))[:SAMPLE]) for _ in range(2))
        exact, effort = _exact_neighbors(vectors, tuning, self.similarity), 1
        while (found := self._measure(vectors, tuning, exact)).mean() < 1 and effort < LARGEST:
            if found.mean() - ERRORS * found.std() / math.sqrt(len(found)) >= recall:
                break
            effort *= 2
            self._set_effort(effort)
        found = self._measure(vectors, test, _exact_neighbors(vectors, test, self.similarity))
        self.settings = replace(self.settings, recall=float(found.mean()))

    def _set_effort(self, effort: int) -> None:
        self.settings = replace(self.settings, effort=effort)
        if self.kind == "hnsw":
            self.faiss.hnsw.efSearch = 16 * effort
        elif self.kind == "ivf":
            self.faiss.nprobe = min(effort, self.faiss.nlist)

    def _measure(self, vectors: Any, sample: Ints, exact: Ints) -> npt.NDArray[np.float64]:
        """The recall of each row of ``sample (Q,)`` as a query; it is not its own neighbor."""
        found = _without_own(self.search(vectors[sample], exact.shape[1] + 1)[1], sample)
        hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
        return np.array(hits) / exact.shape[1] if exact.size else np.ones(1)


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
    return cast(Ints, rows[keep].reshape(len(rows), -1))


def _empty(faiss: Any, settings: IndexSettings) -> Any:
    """The FAISS index of these settings, without vectors."""
    cells = max(1, min(int(4 * math.sqrt(settings.count)), settings.count // 39))  # FAISS asks for 39 rows a cell to train
    if settings.precision == "binary":
        structure = {"exact": "BFlat", "hnsw": "BHNSW32", "ivf": f"BIVF{cells}"}[settings.kind]
        return faiss.index_binary_factory(8 * math.ceil(settings.dimension / 8), structure)
    codes = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}[settings.precision]
    structure = {"exact": codes, "hnsw": f"HNSW32,{codes}", "ivf": f"IVF{cells},{codes}"}[settings.kind]
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
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)  # type: ignore[no-any-return]

"""The command ``search``: build an index of vectors, and ask it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from omegaconf import DictConfig, OmegaConf

from tercet.app.commands.encode import SourceItems, build_source, describe_index
from tercet.app.commands.evaluate import open_member
from tercet.app.commands.mine import KINDS, write_table
from tercet.data import TextFiles
from tercet.data.file_formats import FORMATS
from tercet.errors import InputError, require
from tercet.images import SUFFIXES
from tercet.messages import print_status, printable
from tercet.models import CachedEncoder
from tercet.paths import check_new_folder, check_writable, locate
from tercet.search import BM25, Index, check_same_model, open_vectors, search_hybrid

WORDS = "bm25"  # the folder of the index of words, inside that of the vectors


def run(cfg: DictConfig, output: Path) -> None:
    """Build the index ``output`` of ``vectors``, or ask ``index`` a ``query``."""
    advice = "give vectors=<file> output=<folder> to build an index, index=<folder> query=... to ask one"
    require((cfg.vectors is None) != (cfg.index is None), f"vectors={cfg.vectors}, index={cfg.index}: {advice}.")
    try:
        (_build if cfg.index is None else _ask)(cfg)
    except InputError as error:
        keys = {"folder": "`output`" if cfg.index is None else "`index`", "texts": "`data.path`", "queries": "`query`"}
        raise InputError(error.rename(keys)) from error


def _build(cfg: DictConfig) -> None:
    require(cfg.output, "output must be given: the folder of the new index.")
    require(cfg.query is None, f"query={cfg.query}: an index is built first, then asked: index={cfg.output} query=...")
    target = Path(cfg.output)
    check_new_folder(target, "output")
    vectors = open_vectors(cfg.vectors)
    check_writable(target, "output")
    texts = list(SourceItems(build_source(cfg))) if cfg.data.path is not None else None
    options = {"similarity": cfg.similarity, "precision": cfg.precision, "recall": cfg.recall}
    index = Index.of_vectors(vectors, cfg.kind, texts=texts, **options)
    words = BM25(index.texts(range(len(index)))) if cfg.hybrid else None
    index.save(target)
    if words:
        words.save(target / WORDS)
    print_status(f"{describe_index(index)}. Written to {target}")
    if index.recall < cfg.recall:
        advice = "kind=exact compares all, precision=float32 keeps more"
        print_status(f"warning: that is below recall={cfg.recall}, which this kind did not reach: {advice}.")
    print_status(f"  tercet search index={target} query=...")


def _ask(cfg: DictConfig) -> None:
    require(cfg.query is not None, "query must be given: a text, or a file of texts.")
    target = Path(cfg.output) if cfg.output else None
    if target:
        require(target.suffix in KINDS, f"output={target}: a file of results ends in {', '.join(KINDS)}.")
        check_writable(target.parent, "output")
    index = Index.load(cfg.index)
    queries = _queries(cfg.query)
    name = cfg.model.path or index.model
    require(name, f"model must be given: index={cfg.index} was built of vectors that name no model.")
    model = OmegaConf.merge(cfg.model, {"path": name})
    encoder = open_member(OmegaConf.create({"model": model, "device": cfg.device}), name)
    check_same_model(encoder, index.settings.signature, index.model)
    items: Sequence[Any] = queries if encoder.kind != "image" else [_picture(query) for query in queries]
    z = CachedEncoder(encoder, progress="encoding" if len(items) > 1 else None).for_column(0)(items).numpy()
    if cfg.hybrid:
        saved = locate(cfg.index) / WORDS
        words = BM25.load(saved, len(index)) if saved.is_dir() else BM25(index.texts(range(len(index))))
        scores, rows = search_hybrid(index, words, z, queries, cfg.k)
    else:
        scores, rows = index.search(z, cfg.k)
    found = [(q, rank, float(s), row) for q, line in enumerate(rows.tolist())
             for rank, (s, row) in enumerate(zip(scores[q], line, strict=True), 1) if row >= 0]  # fmt: skip
    at = [row for *_, row in found]
    table: dict[str, list[Any]] = {"query": [queries[q] for q, *_ in found], "rank": [rank for _, rank, *_ in found],
             "score": [score for _, _, score, _ in found], "id": index.ids(at), "text": index.texts(at)}  # fmt: skip
    if target:
        write_table(pa.table(table), target)
        print_status(f"{len(found)} results of {len(queries)} queries. Written to {target}")
    else:
        _show(table)


def _queries(query: str) -> list[str]:
    """One text, or the texts of a file, which is told by its ending."""
    require(query.strip(), "query is empty: a text is needed, or a file of texts.")
    if Path(query).suffix.lower() not in FORMATS or len(query.split()) > 1:
        return [query]
    try:
        source = TextFiles(query)
        return [str(text) for text in source.rows()[source.columns[0]]]
    except InputError as error:
        raise InputError(error.rename({"path": "`query`", "columns": "`query`"})) from error


def _picture(query: str) -> bytes:
    file = locate(query)
    is_image = file.is_file() and file.suffix.lower() in SUFFIXES
    require(is_image, f"query={query}: the model reads images; name the file of one ({', '.join(SUFFIXES)}).")
    return file.read_bytes()


def _show(table: dict[str, list[Any]]) -> None:
    """Print the results, one a line, below the query where there are several."""
    several = len(set(table["query"])) > 1
    before = None
    for query, rank, score, _, text in zip(*table.values(), strict=True):
        if several and query != before:
            print(f"{'' if before is None else chr(10)}{printable(query, lines=False)}")
        before = query
        print(f"{rank:3}  {score:.4f}  {printable(text, lines=False)}")

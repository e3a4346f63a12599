"""The command ``mine``: hard negatives for pairs or labeled texts, as a file to train on."""

import csv
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from tercet.app.commands.evaluate import open_model
from tercet.app.components import build, check_values
from tercet.errors import require
from tercet.evaluation.inputs import Ints
from tercet.evaluation.search import FalseNegativeFilter, hard_negatives
from tercet.messages import print_status
from tercet.models import CachedEncoder, Encoder
from tercet.paths import atomic_write, check_writable
from tercet.types import Source

KINDS = (".parquet", ".csv", ".tsv", ".jsonl")
IMAGES = "For images use callback=hard_labels in training."


@dataclass(frozen=True)
class MiningPairs:
    """A anchors with one positive each, and the M ``keys`` that negatives are chosen from.

    ``allowed`` takes anchors ``(a,)`` and keys of each ``(a, m)``: True where the key is no known positive of the anchor.
    """

    anchors: list[str]
    positives: list[str]
    keys: list[str]
    allowed: Callable[[Tensor, Tensor], Tensor]
    column: int = 0  # of the rows that positives and keys are from, for their prompt


def run(cfg: DictConfig, output: Path) -> None:
    """Embed, search, write ``anchor``, ``positive``, ``negative`` and the two cosines."""
    target = Path(cfg.output)
    require(target.suffix in KINDS, f"output={target}: a file that ends in {', '.join(KINDS)} is needed.")
    require(cfg.negatives > 0 and cfg.skip >= 0, f"negatives={cfg.negatives}, skip={cfg.skip}: 1 or more, and 0 or more.")
    check_writable(target.parent, "output")
    train = OmegaConf.to_container(cfg.data.train, resolve=True)
    check_values(OmegaConf.create({"guard": cfg.guard, "data": {"train": train}}), cfg)
    guard: FalseNegativeFilter = build(cfg.guard)
    source = build(cfg.data.train)
    encoder = open_model(cfg.model.path, cfg.model.pooling, cfg.device, cfg.seed, cfg.model.trust_remote_code)
    require(encoder.text_parts(), f"model={cfg.model.path} is no encoder of texts that mine can use. {IMAGES}")
    pairs = read_mining_pairs(source, cfg.seed, encoder)
    table = mine_negatives(pairs, CachedEncoder(encoder, progress="embedding"), guard, cfg.negatives, cfg.skip)
    limits = f"guard.max_similarity={guard.max_similarity} and guard.relative_margin={guard.relative_margin}"
    require(len(table), f"No negative is left of {len(pairs.keys)} texts: {limits} exclude all of them. Relax them.")
    write_table(table, target)
    got = len(set(zip(table["anchor"].to_pylist(), table["positive"].to_pylist(), strict=True)))
    means = f"positives {np.mean(table['positive_cosine']):.3f}, negatives {np.mean(table['negative_cosine']):.3f}"
    print_status(f"{len(table)} rows of {len(pairs.anchors)} pairs ({got} different ones have a negative).")
    print_status(f"Mean cosine: {means}. Written to {target}. To train on it:")
    columns = "'data.columns=[anchor,positive,negative]'"
    print_status(f"  tercet train objective=simcse_sup data=text data.path={target} {columns}")


def read_mining_pairs(source: Source, seed: int, encoder: Encoder) -> MiningPairs:
    """The pairs of a source with two columns or more; of one column, the pairs of texts with equal labels."""
    rows = source.rows()
    first = list(rows[source.columns[0]])
    require(first and isinstance(first[0], str), f"data.path: mine reads texts; this data holds images. {IMAGES}")
    if len(source.columns) > 1:
        return pairs_of_columns(first, list(rows[source.columns[1]]), encoder)
    advice = "two columns, as data.columns=[question,answer], or one with a label, as data.label=intent."
    require("label" in rows.column_names, f"mine needs pairs: {advice}")
    return pairs_of_labels(first, np.array(rows["label"]), seed, encoder)


def number_inputs(texts: Iterable[str], encoder: Encoder) -> dict[str, int]:
    """A number for each text, from 0 and in order: equal for texts that the model gets as the same tokens."""
    unique, numbers = list(dict.fromkeys(texts)), dict[bytes, int]()
    rows = encoder.text_parts()[0].prepare(unique).rows()
    return {text: numbers.setdefault(row.numpy().tobytes(), len(numbers)) for text, row in zip(unique, rows, strict=True)}


def _first_of_each(texts: Iterable[str], number: dict[str, int]) -> dict[int, str]:
    found: dict[int, str] = {}
    for text in texts:
        found.setdefault(number[text], text)
    return found


def pairs_of_columns(first: list[str], second: list[str], encoder: Encoder) -> MiningPairs:
    """Pairs of two columns; a negative is never a document of the same anchor in any row, nor the anchor itself."""
    number = number_inputs([*second, *first], encoder)  # which is the index of a key, for a document
    keys = list(_first_of_each(second, number).values())
    pairs = {(number[a], number[b]) for a, b in zip(first, second, strict=True)}
    pairs |= {(number[a], number[a]) for a in first if number[a] < len(keys)}
    known = torch.tensor([a * len(keys) + b for a, b in pairs])
    anchor = torch.tensor([number[a] for a in first])
    return MiningPairs(first, second, keys, lambda rows, at: ~torch.isin(anchor[rows, None] * len(keys) + at, known), 1)


def pairs_of_labels(texts: list[str], label: Ints, seed: int, encoder: Encoder) -> MiningPairs:
    """Pair each labeled text with a random one of its label; negatives have another label, or none."""
    rng, anchors, positives = np.random.default_rng(seed), [], []
    number = number_inputs(texts, encoder)
    for name in np.unique(label[label >= 0]):
        members = list(_first_of_each((texts[i] for i in np.flatnonzero(label == name)), number).values())
        if len(members) > 1:  # a derangement: the next one in a random circle
            order = rng.permutation(len(members))
            anchors += [members[i] for i in order]
            positives += [members[i] for i in np.roll(order, -1)]
    require(anchors, "data.label: no label has two different texts, so there are no positives.")
    label_of: dict[int, int] = {}
    for text, name in zip(texts, label.tolist(), strict=True):
        n = number[text]
        label_of[n] = name if label_of.get(n, name) == name else -2  # a text of two labels is no negative of either
    keys = list(_first_of_each(texts, number).values())
    codes, own = torch.tensor(list(label_of.values())), torch.tensor([label_of[number[text]] for text in anchors])
    return MiningPairs(anchors, positives, keys, lambda rows, at: (codes[at] != own[rows, None]) & (codes[at] != -2))


def mine_negatives(pairs: MiningPairs, encode: CachedEncoder, guard: FalseNegativeFilter, count: int, skip: int) -> pa.Table:
    """Mine a table with one row per anchor and negative, the nearest negative first."""
    queries, documents = (encode.for_column(0), encode.for_column(pairs.column)) if pairs.column else (encode, encode)
    x = F.normalize(queries(pairs.anchors), dim=-1)
    y, keys = (F.normalize(documents(texts), dim=-1) for texts in (pairs.positives, pairs.keys))
    own = (x * y).sum(1)
    scores, at = hard_negatives(x, keys, pairs.allowed, guard.limit(own), count + skip)
    row, column = (at[:, skip:] >= 0).nonzero(as_tuple=True)
    chosen = at[row, column + skip].tolist()
    texts = {"anchor": [pairs.anchors[i] for i in row.tolist()], "positive": [pairs.positives[i] for i in row.tolist()],
             "negative": [pairs.keys[i] for i in chosen]}  # fmt: skip
    cosines = {"positive_cosine": own[row].numpy(), "negative_cosine": scores[row, column + skip].numpy()}
    return pa.table(texts | cosines)


def write_table(table: pa.Table, target: Path) -> None:
    """Write a table in the format of the file's ending; the file is replaced as a whole.

    In CSV and TSV line ends and tabs in texts become spaces: there a row is one line, and a cell of TSV cannot be quoted.
    """
    with atomic_write(target) as partial:
        if target.suffix == ".parquet":
            pq.write_table(table, partial)
        elif target.suffix == ".jsonl":
            table.to_pandas().to_json(partial, orient="records", lines=True, force_ascii=False)
        else:
            rows = [table.column_names, *zip(*(column.to_pylist() for column in table.columns), strict=True)]
            style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n", **(style if target.suffix == ".tsv" else {}))
                writer.writerows([re.sub(r"[\t\r\n]+", " ", str(cell)) for cell in row] for row in rows)

"""What the recipe of one's own texts does to small data: six sets of 100 or 120 rows, measured before and after training.

``python -m benchmarks.small_data`` trains each with three seeds, as ``tercet train data=text data.path=… data.columns=…`` does,
and prints a table: a quarter of an hour on one CPU core. Each seed has its own rows, and for the test 80 further rows of the
same kind, which neither training nor validation has seen. ``--quickstart`` trains 50 steps at 1e-4 instead, whatever the size.
Needs TERCET_DATA.
"""

import argparse
import csv
import json
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from scipy import stats

from tercet.app.cli import main as tercet
from tercet.data import Bible
from tercet.paths import locate

FRESH = 80  # rows of each test
Row = Sequence[Any]


class Kind(NamedTuple):
    """Rows of a kind: ``make(rng)`` gives all of them in random order, of which ``size`` are trained on."""

    size: int
    columns: tuple[str, ...]
    objective: str  # what the recipe is expected to choose
    make: Callable[[random.Random], Iterable[Row]]
    label: bool = False


def table(name: str, **where: Any) -> list[dict[str, Any]]:
    """The rows of a shared file in which each column of ``where`` has its value."""
    rows: list[dict[str, Any]] = pq.read_table(locate(name)).to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def shuffled(rng: random.Random, rows: Iterable[Any]) -> list[Any]:
    """The rows in random order."""
    rows = list(rows)
    rng.shuffle(rows)
    return rows


def pairs(rng: random.Random, rows: Sequence[dict[str, Any]], group: str) -> list[Row]:
    """Pairs of texts of one group, each text once."""
    groups = defaultdict(list)
    for row in shuffled(rng, rows):
        groups[row[group]].append(row["text"])
    return shuffled(rng, (pair for texts in groups.values() for pair in zip(texts[::2], texts[1::2], strict=False)))


def intents(rng: random.Random, labels: int = 12, each: int = 10) -> list[Row]:
    """Queries of some intents, each ``each`` times among the rows to train on and ``each`` times among the others."""
    groups = defaultdict(list)
    for row in shuffled(rng, table("labelled_text.parquet", dataset="clinc150", split="train")):
        groups[row["label"]].append((row["text"], row["label"]))
    chosen = rng.sample(sorted(groups), labels)
    train, test = ([row for name in chosen for row in groups[name][i : i + each]] for i in (0, each))
    return [*shuffled(rng, train), *shuffled(rng, test)]


def bank_questions(rng: random.Random) -> list[Row]:
    """Two questions to a bank of one intent."""
    return pairs(rng, table("labelled_text.parquet", dataset="banking77"), "label")


def nli(rng: random.Random) -> list[Row]:
    """A premise, an entailed and a contradicted sentence."""
    rows = shuffled(rng, table("nli_triplets.parquet", split="train"))
    return [(row["sent0"], row["sent1"], row["hard_neg"]) for row in rows]


def verses(rng: random.Random) -> list[Row]:
    """A verse in Middle English and in modern English."""
    return [tuple(row.values()) for row in shuffled(rng, Bible().rows())]


def captions(rng: random.Random) -> list[Row]:
    """Two captions of a picture, of each picture once."""
    rows = table("captions_groups.parquet", split="train")
    return pairs(rng, [row for row in rows if row["caption_no"] in (1, 2)], "image_id")


def sentences(rng: random.Random) -> list[Row]:
    """Single sentences of Wikipedia."""
    rows = table("sentences_unlabelled.parquet", source="wikipedia")
    return [(row["text"],) for row in rng.sample(rows, 500) if len(row["text"].split()) >= 4]


KINDS = {
    "questions to a bank, two of one intent": Kind(120, ("question", "other"), "simcse_sup", bank_questions),
    "NLI triplets": Kind(120, ("premise", "entailed", "contradicted"), "simcse_sup", nli),
    "verses, Middle English and modern": Kind(120, ("text", "paraphrase"), "simcse_sup", verses),
    "queries with their intent": Kind(120, ("query",), "facenet", intents, label=True),
    "captions, two of one picture": Kind(120, ("caption", "other"), "simcse_sup", captions),
    "100 sentences": Kind(100, ("text",), "simcse_unsup", sentences),
}
MEASURED = {"facenet": "nearest_neighbor/text/recall@1"}  # by objective; else:
RETRIEVAL = "retrieval/text/recall@1"


def train(kind: Kind, seed: int, folder: Path, quickstart: bool) -> tuple[float, float]:
    """recall@1 of the fresh rows before and after training."""
    rows = list(kind.make(random.Random(seed)))
    for name, part in (("rows", rows[: kind.size]), ("fresh", rows[kind.size : kind.size + FRESH])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[*kind.columns, *["label"] * kind.label], *part])
    overrides = ["data=text", f"data.path={folder}/rows.csv", f"data.columns=[{','.join(kind.columns)}]"]
    overrides += ["data.label=label"] * kind.label
    overrides += ["experiment=quickstart", f"objective={kind.objective}"] if quickstart else []
    measure = [f"data.test.path={folder}/fresh.csv", "data.test.split=all"]
    few = [f"callback.{name}=null" for name in ("embeddings", "before_after", "last")]
    few += [
        "callback.best.save_weights_only=true",
        "trainer.enable_progress_bar=false",
        "trainer.enable_model_summary=false",
        "logger=none",
    ]
    cpu = ["trainer.accelerator=cpu", "num_threads=1", *few, f"seed={seed}", f"output_dir={folder}/run"]
    try:
        tercet("train", [*overrides, *measure, *cpu])
    except SystemExit as stopped:
        if stopped.code:
            raise
    metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    name = MEASURED.get(kind.objective, RETRIEVAL)
    return metrics[f"before/{name}"], metrics[f"test/{name}"]


def line(name: str, found: Sequence[tuple[float, float]]) -> str:
    """A row of the table: the means, and the difference with its t interval over seeds."""
    before, after = zip(*found, strict=True)
    gains = [b - a for a, b in found]
    sd = statistics.stdev(gains) if len(gains) > 1 else float("nan")
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * sd / len(gains) ** 0.5
    mean, kept = statistics.mean(gains), sum(gain == 0 for gain in gains)
    cells = f"{statistics.mean(before):.3f} | {statistics.mean(after):.3f} | {mean:+.3f} ± {sd:.3f}"
    return f"| {name} | {cells} | [{mean - half:+.3f}, {mean + half:+.3f}] | {kept} of {len(gains)} |"


def main() -> None:
    """Print the table, at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--quickstart", action="store_true")
    given = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in given.kinds}
    for seed in given.seeds:
        for name in given.kinds:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(train(KINDS[name], seed, Path(folder), given.quickstart))
            print(f"seed {seed}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print("| data | before | after | difference, ± sd | 95 % t interval | unchanged |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(line(name, values) for name, values in found.items()))


if __name__ == "__main__":
    main()

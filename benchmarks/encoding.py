"""Encoding beside ``SentenceTransformer.encode``, in float32 and in int8, and what int8 costs in quality.

    python -m benchmarks.encoding                    20,000 sentences each, about six minutes on one thread
    python -m benchmarks.encoding --sentences 4000
    python -m benchmarks.encoding --device cuda      in float32 as above, without the exports

all-MiniLM-L6-v2, mean pooling, 256 tokens at most. The sentences come in parts that everybody encodes in turn.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import device
from benchmarks.report import write
from benchmarks.shapes import MODEL
from benchmarks.texts import sentences, source
from benchmarks.turns import by_turns, surroundings
from tercet.app.commands.evaluate import open_model
from tercet.evaluation import STS
from tercet.models import CachedEncoder, Encoder, load
from tercet.models.export import export_model
from tercet.models.pretrained import resolve_source

Encode = Callable[[list[str]], Any]
PART = 1000
GOALS = {"tercet": 1.3, "tercet, int8": 2.5}
PEER = "sentence-transformers"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Encoding beside sentence-transformers.")
    parser.add_argument("--sentences", type=int, default=20_000)
    device.add(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/encoding.json"))
    return parser.parse_args()


def anew(encoder: Encoder) -> Encode:
    """A new ``Encoding`` for each call: nothing is remembered."""
    return lambda texts: CachedEncoder(encoder)(texts)


def contenders(where: str) -> dict[str, Encode]:
    """Functions of a list of texts; exports run on a CPU."""
    from sentence_transformers import SentenceTransformer

    ours = open_model(MODEL, None, where).eval()
    theirs = SentenceTransformer(resolve_source(MODEL, "model"), device=where)
    found: dict[str, Encode] = {
        "tercet": anew(ours),
        PEER: lambda texts: theirs.encode(texts, batch_size=32, convert_to_tensor=True, show_progress_bar=False),
        **{
            f"{PEER}, batch {size}": lambda texts, size=size: theirs.encode(
                texts, batch_size=size, convert_to_tensor=True, show_progress_bar=False
            )
            for size in ((128,) if where == "cpu" else (128, 512))
        },
    }
    for precision in ("float32", "int8") if where == "cpu" else ():
        folder = Path(tempfile.mkdtemp())
        export_model(ours, folder, precision=precision)  # type: ignore[arg-type]
        name = "tercet, int8" if precision == "int8" else "tercet, ONNX float32"
        found[name] = anew(load(folder))
    return found


def step_of(encode: Encode, parts: Iterator[list[str]]) -> Callable[[], tuple[float, float]]:
    """Encodes the next part; seconds of wall and of CPU time."""

    def step() -> tuple[float, float]:
        texts = next(parts)
        start = device.now()
        encode(texts)
        return device.since(start)

    return step


def quality(encode: Encode) -> float | None:
    """STS-B's test, Spearman x 100; None without TERCET_DATA."""
    root = os.environ.get("TERCET_DATA")
    if not root:
        return None
    metrics = STS(f"{root}/sts.parquet", ["STS-B"], "test")(lambda texts: encode(list(texts)))  # type: ignore[arg-type]
    return 100 * metrics["sts/stsb/spearman"]


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    device.prepare(options)
    clock = device.clock(options.device)
    texts = sentences(options.sentences)
    parts = [texts[i : i + PART] for i in range(0, len(texts), PART)]
    encoders = contenders(options.device)
    reference = encoders[PEER](parts[0][:100])
    off = {name: float((encode(parts[0][:100]) - reference).abs().max().cpu()) for name, encode in encoders.items()}
    found = by_turns({name: step_of(encode, iter(parts)) for name, encode in encoders.items()}, len(parts))
    theirs = min(row[clock] for name, row in found.items() if name.startswith(PEER))  # at its best setting
    rows = [
        {"name": name, "sentences_per_second": PART / row[clock], "ratio": theirs / row[clock], "goal": GOALS.get(name),
         "apart_by": off[name], "stsb_test": quality(encoders[name]), **row}
        for name, row in found.items()
    ]  # fmt: skip
    write(options.output, rows, {"part": PART, "texts": source(), **surroundings(options.threads)})


if __name__ == "__main__":
    main()

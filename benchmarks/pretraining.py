"""A base encoder for a given time, then contrastive training from it: ``benchmarks.gpu --pretrain MINUTES``.

    python -m benchmarks.pretraining FOLDER    write its texts as one file, FOLDER/english.parquet, smaller and read in seconds

Where TERCET_DATA holds ``english.parquet`` that is read, else ``sentences_unlabelled``, ``books_ordered`` and ``transfer``;
besides ``sts``, ``nli_triplets`` and BERT's tokenizer.
"""

import csv
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FILE = "english.parquet"
PART_BYTES = 15 << 20  # of the model in the output folder
SHARES = {"pretraining": 1, "unsupervised": 1 / 3, "supervised": 1 / 6}  # of the minutes
STARTUP, AROUND = 15.0, 20.0  # seconds of imports, and around a training until it has been timed
TINY = [  # a rehearsal
    "model.backbone.config.hidden_size=128", "model.backbone.config.num_hidden_layers=2",
    "model.backbone.config.num_attention_heads=2", "model.backbone.config.intermediate_size=256", "data.batch_size=32",
    "data.workers=0", "evaluation@test=stsb_dev",
]  # fmt: skip


def texts(prepared: bool, cuda: bool) -> list[str]:
    """What is read: the prepared file or the shared data, in a rehearsal a part of it."""
    if not prepared:
        no_books = ["data.train.sources.books=null", "data.validation.sources.books=null"]
        return [] if cuda else ["data.where={source:[brown]}", *no_books]
    part = "" if cuda else ",source:[brown]"
    held_out = f"path:{FILE},columns:[text],where:{{split:validation{part}}}"
    return [
        "data=table", "data.name=english", f"data.path={FILE}", "data.columns=[text]", "data.batch_size=1024",
        "data.max_length=128", "data.held_out=0", "data.test=null", f"data.where={{split:train{part}}}",
        f"objective.held_out={{_target_:tercet.data.TextFiles,{held_out}}}",
    ]  # fmt: skip


def runs(device: str) -> dict[str, list[str]]:
    """The overrides of each training but its time, and where it starts."""
    cuda, prepared = device == "cuda", (Path(os.environ.get("TERCET_DATA", ".")) / FILE).is_file()
    shared = ["model=bert_6x384", "logger=csv", "callback.embeddings=null", "artifacts=null", "measure_before=false"]
    shared += ["trainer=gpu"] if cuda else ["trainer=cpu", *TINY]
    return {
        "pretraining": [
            "experiment=pretrain_english_small", *texts(prepared, cuda), *shared, "save_dtype=float16",
            *(["data.workers=12"] if cuda else []),
        ],
        "unsupervised": [
            "experiment=simcse_unsup_small", *shared, "trainer.max_steps=-1",
            *([f"data.path={FILE}", "+data.where.split=train"] if prepared else []),
            *([] if cuda else ["data.where.source=[brown]"]),
            "optimizer.lr=5e-5", *(["data.batch_size=128", "data.workers=4"] if cuda else []),
        ],
        "supervised": [
            "experiment=simcse_sup_small", *shared, "trainer.max_steps=-1",
            "optimizer.lr=1e-4", *(["data.batch_size=256", "data.workers=4"] if cuda else []),
        ],
    }  # fmt: skip


def pretrain(device: str, minutes: float, output: Path, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All three; ``show`` gets what is known so far. It takes 1.5 times the minutes and one more."""
    from benchmarks.composed import configuration
    from benchmarks.gpu import command
    from tercet.app.components import build

    start, found, validations = time.monotonic(), dict[str, Any](), 5 if device == "cuda" else 3
    end = start + 60 * (1.5 * minutes + 1) - STARTUP
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    folder, base, jobs = Path(tempfile.mkdtemp()), None, runs(device)
    for overrides in jobs.values():
        build(configuration(overrides).data.module).prepare_data()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are forked from here on
    found["tokenizing s"] = time.monotonic() - start
    around = AROUND
    for number, (name, overrides) in enumerate(jobs.items()):
        left, begun = list(SHARES.values())[number:], time.monotonic()
        room = end - begun - around * len(left)
        seconds = int(min(60 * minutes * left[0], room * left[0] / sum(left)))
        if seconds < 5 or (base is None and number):
            found[name] = "no time left" if base or not number else "there is no base encoder"
            continue
        run = folder / name
        times = [f"trainer.max_time={clock(seconds)}", f"trainer.val_check_interval={clock(max(3, seconds // validations))}"]
        code, error = command("train", *overrides, *times, f"output_dir={run}", *([f"init_from={base}"] if base else []))
        if code:
            found[name] = {"exit_code": code, "error": error}
        else:
            found[name] = results(run, found.get("pretraining")) | {"time s": seconds}
            around = max(around, time.monotonic() - begun - seconds)
            keep(run, output / name)
            if base is None:
                base = run
                found["model"] = f"{split(run / 'model', output)} parts: cat model.tar.* | tar x"
        show(found)
    shutil.rmtree(folder)
    return found


def clock(seconds: int) -> str:
    """DD:HH:MM:SS."""
    return f"00:{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def results(run: Path, base: dict[str, Any] | None) -> dict[str, Any]:
    """What a run has measured, in a few numbers; what is measured of its ``base`` is that of before."""
    metrics = json.loads((run / "metrics.json").read_text())
    names = {
        "tokens/s": "train/tokens_per_second", "loss": "train/loss",
        "perplexity": "val/mlm/perplexity", "STS-B dev": "val/sts/stsb/spearman",
        "STS": "test/sts/avg/spearman_all", "STS-B": "test/sts/stsb/spearman",
    }  # fmt: skip
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {name: metrics[key] for name, key in names.items() if key in metrics} | {"steps": rows[-1]["step"]}
    found |= {f"{name} before": base[name] for name in ("STS-B dev", "STS", "STS-B") if name in (base or {})}
    curve = [float(row["val/mlm/perplexity"]) for row in rows if row.get("val/mlm/perplexity")]
    return found | ({"perplexity curve": " ".join(f"{x:.4g}" for x in curve)} if curve else {})


def keep(run: Path, output: Path) -> None:
    """Copy the curve, the metrics and the configuration of a run."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.csv", "metrics.json", "config.yaml"):
        shutil.copy(run / name, output / name)


def split(model: Path, output: Path) -> int:
    """Write a model folder as parts of a tar file; returns their number."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(model, arcname="model")
    content = packed.getvalue()
    parts = range(0, len(content), PART_BYTES)
    for number, at in enumerate(parts):
        (output / f"model.tar.{number:02d}").write_bytes(content[at : at + PART_BYTES])
    return len(parts)


def prepare(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Write the texts of ``data=english`` with the columns text, source and split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarks.composed import configuration
    from tercet.app.components import build
    from tercet.paths import locate

    cfg = configuration(["experiment=pretrain_english_small", *overrides])
    table = pq.read_table(locate(cfg.data.sentences), columns=["text", "source"])
    source = dict(zip((text.strip() for text in table["text"].to_pylist()), table["source"].to_pylist(), strict=True))
    made = []
    for side in ("train", "validation"):
        texts = build(cfg.data[side]).rows()["text"][:]
        sources = [source.get(text, "books") for text in texts]
        made.append(pa.table({"text": texts, "source": sources, "split": [side] * len(texts)}))
    path = folder / FILE
    table = pa.concat_tables(made).sort_by([("split", "ascending"), ("source", "ascending")])
    options = {"compression": "zstd", "compression_level": 19, "data_page_size": 1 << 28}  # compressed as one page
    pq.write_table(table, path, use_dictionary=["source", "split"], write_statistics=False, **options)
    return path


if __name__ == "__main__":
    written = prepare(Path(sys.argv[1]), sys.argv[2:])
    print(f"{written}: {written.stat().st_size / 2**20:.1f} MiB")

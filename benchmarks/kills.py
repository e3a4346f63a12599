"""A run that is killed at random moments, again and again, ends with the weights of one that was not.

    python -m benchmarks.kills                              240 kills, about 12 minutes on one core
    python -m benchmarks.kills --kills 3 --only images

Every kind of batch (random rows, rows without duplicates, images, a stream, labels, windows) with 0, 1 and 2 workers. A life
of a run ends, at a moment drawn between the start of its process and the end of its training, by SIGKILL of the main process or
of its process group, or by SIGTERM or SIGINT to the group, as ``timeout``, ``scancel`` and Ctrl-C send them. The same command
with ``resume=true`` goes on. A small random model with dropout; weights are compared bit by bit with those of a whole run.

Each run is forked from this process, which has imported everything and started no thread: a start takes no imports.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import transformers.models.bert.modeling_bert
import transformers.models.resnet.modeling_resnet  # noqa: F401
from PIL import Image

import tercet.app.commands.train
from benchmarks.report import write
from benchmarks.shapes import MODEL
from benchmarks.texts import sentences
from benchmarks.turns import surroundings
from tercet.app.cli import main as tercet

ROWS, BATCH = 48, 8  # six batches an epoch
WORKERS = (0, 1, 2)
WAYS = ("SIGKILL", "SIGKILL to the group", "SIGTERM to the group", "SIGINT to the group")
EXITS = {"SIGTERM to the group": 143, "SIGINT to the group": 130}
ENDED = 60.0  # seconds that a signal may take to end a run
BERT = ["model=bert_small", f"model.tokenizer.name={MODEL}", "model.backbone.config.hidden_size=32",
        "model.backbone.config.num_hidden_layers=2", "model.backbone.config.num_attention_heads=2",
        "model.backbone.config.intermediate_size=64"]  # fmt: skip
RESNET = ["model=resnet_small", "model.pixels.size=16", "model.backbone.config.embedding_size=8", "model.head.dim=8",
          "model.backbone.config.hidden_sizes=[8,16]", "model.backbone.config.depths=[1,1]", "model.norm=group"]  # fmt: skip
TEXT = ["data=text", "data.path={folder}/rows.csv", "data.columns=[text]", *BERT]
KINDS = {
    "rows": [*TEXT, "objective=simcse_unsup"],
    "no duplicates": [*TEXT, "objective=simcse_unsup", "sampler=no_duplicates"],
    "images": ["data=images", "data.path={folder}/images", "data.held_out=0", "data.test=null", "objective=facenet",
               "sampler.per_label=2", "data.transform.augment.crop=0.6", *RESNET],
    "stream": [*TEXT, "objective=simcse_unsup", "data.streaming=true", "data.shuffle_buffer=20"],
    "labels": [*TEXT, "objective=facenet", "data.label=topic", "sampler.per_label=2", "callback=hard_labels"],
    "windows": [*TEXT, "objective=quick_thoughts", "data.label=book", "data.position=place", "sampler.window=4"],
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill runs again and again.")
    parser.add_argument("--kills", type=int, default=240, help="of all runs together")
    parser.add_argument("--steps", type=int, default=120, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=KINDS, nargs="*", default=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/kills.json"))
    return parser.parse_args()


def write_data(folder: Path) -> None:
    """Sentences with a topic, a book and a place in it, two of them twice; and noise as images of eight labels."""
    texts = [text.replace('"', "'") for text in sentences(ROWS - 2)]
    rows = [f'"{text}",{i % 8},{i // 16},{i % 16}' for i, text in enumerate([*texts, *texts[:2]])]
    (folder / "rows.csv").write_text("\n".join(["text,topic,book,place", *rows]) + "\n", encoding="utf-8")
    noise = np.random.default_rng(0)
    for i in range(ROWS):
        file = folder / "images" / str(i % 8) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (20, 20), np.uint8)).save(file)


def command(kind: str, workers: int, folder: Path, output: Path, steps: int) -> list[str]:
    """The overrides of a run that writes a checkpoint every other step."""
    return [
        *(override.format(folder=folder) for override in KINDS[kind]), f"data.workers={workers}", f"data.batch_size={BATCH}",
        "num_threads=1", f"trainer.max_steps={steps}", "trainer.max_epochs=1000", "trainer.accelerator=cpu", "save_every=2",
        "measure_before=false", "logger=none", "evaluation@test=none", "selection=none", "callback.progress=null",
        "callback.summary=null", "callback.embeddings=null", f"output_dir={output}", "resume=true",
    ]  # fmt: skip


def start(given: Sequence[str], log: Path) -> tuple[int, int]:
    """Fork a run, in a process group of its own: its id, and a pipe that says when training begins."""
    reading, writing = os.pipe()
    if process := os.fork():
        os.close(writing)
        return process, reading
    os.setpgid(0, 0)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this process is in the background
    fit = pl.Trainer.fit

    def announced(*values: Any, **names: Any) -> None:
        os.write(writing, b"!")
        fit(*values, **names)

    pl.Trainer.fit = announced  # type: ignore[method-assign]
    code = 1
    try:
        tercet("train", given)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """The exit code, negative for a signal; None where the process has not ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def live(given: Sequence[str], log: Path, moment: float, share: float, way: str) -> tuple[int, bool]:
    """One life of a run: the exit code, and whether a signal was sent.

    ``moment`` is in seconds since training began; of a ``share`` below a tenth, since the process did.
    """
    process, pipe = start(given, log)
    os.set_blocking(pipe, False)
    if share >= 0.1:
        while (code := wait(process, 0.01)) is None:
            try:
                os.read(pipe, 1)
                break
            except BlockingIOError:
                continue
        else:
            os.close(pipe)
            return code, False
    os.close(pipe)
    if (code := wait(process, moment)) is not None:
        return code, False
    number = getattr(signal, way.split()[0])
    (os.killpg if "group" in way else os.kill)(process, number)
    if (code := wait(process, ENDED)) is None:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise SystemExit(f"{way}: the process lives on after {ENDED:.0f} s; {log}")
    return code, True


def last(output: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    content: dict[str, Any] = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def same(one: Path, other: Path) -> bool:
    """Whether two runs have made the same steps and have the same weights, bit by bit."""
    a, b = last(one), last(other)
    equal = all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    return equal and a["global_step"] == b["global_step"]


def killed(
    kind: str, workers: int, folder: Path, options: argparse.Namespace, kills: int, draw: random.Random
) -> dict[str, Any]:
    """One case of the matrix: a whole run, and one in ``kills`` + 1 lives."""
    name = f"{kind.replace(' ', '_')}-{workers}"
    whole, pieces, log = folder / f"{name}-whole", folder / f"{name}-pieces", folder / f"{name}.log"
    begun = time.perf_counter()
    code, _ = live(command(kind, workers, folder, whole, options.steps), log, 600, 1.0, WAYS[0])
    if code:
        raise SystemExit(f"{name}: the whole run failed.\n{log.read_text()}")
    seconds = time.perf_counter() - begun
    given, lives, faults = command(kind, workers, folder, pieces, options.steps), 0, list[str]()
    counts = dict.fromkeys(WAYS, 0)
    while lives < kills:
        way, share = WAYS[lives % len(WAYS)], draw.random()
        code, sent = live(given, log, draw.uniform(0, 1.6 * seconds / (kills + 1)), share, way)
        if not sent:
            if code:
                raise SystemExit(f"{name}: a resumed run failed.\n{log.read_text()}")
            break  # it came to its end before
        lives, counts[way] = lives + 1, counts[way] + 1
        expected = EXITS.get(way, -signal.SIGKILL)
        if code not in (expected, 0) and share >= 0.1:
            faults.append(f"{way}: exit {code}, not {expected}: {log.read_text()[-300:]!r}")
    if (code := live(given, log, 600, 1.0, WAYS[0])[0]) != 0:
        raise SystemExit(f"{name}: the last life failed.\n{log.read_text()}")
    row = {"kind": kind, "workers": workers, **counts, "identical": same(whole, pieces), "wrong_exits": len(faults)}
    print(row, *faults, sep="\n  ", flush=True)
    return row


def main() -> None:
    """All cases; exits with 1 where one ends with other weights, or a signal with a wrong exit code."""
    options = arguments()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    os.environ["TERCET_CACHE"] = str(folder / "cache")
    write_data(folder)
    draw = random.Random(options.seed)
    cases = [(kind, workers) for kind in options.only for workers in WORKERS]
    begun = time.perf_counter()
    kills = -(-options.kills // len(cases))
    rows = [killed(kind, workers, folder, options, kills, draw) for kind, workers in cases]
    total = sum(row[way] for row in rows for way in WAYS)
    lost = sum(sum(row[way] for way in WAYS) for row in rows if not row["identical"])
    wrong = sum(row["wrong_exits"] for row in rows)
    minutes = (time.perf_counter() - begun) / 60
    print(f"{total - lost} of {total} kills in runs that end bit-identical, {wrong} wrong exit codes, {minutes:.1f} minutes")
    write(options.output, rows, {"steps": options.steps, "kills": total, **surroundings(1)})
    raise SystemExit(bool(lost or wrong))


if __name__ == "__main__":
    main()

"""Everything that needs a GPU, in one command.

    python -m benchmarks.gpu --minutes 8             all parts
    python -m benchmarks.gpu --parts training profile
    python -m benchmarks.gpu --parts none --pretrain 6    a base encoder of our own, then SimCSE from it: about ten minutes
    python -m benchmarks.gpu --device cpu --minutes 3    a rehearsal with tiny shapes

Needs torch, transformers, pytorch-lightning, hydra-core and datasets; the sources may stand on PYTHONPATH, no network is used,
and weights are random. TERCET_DATA names the folder of the shared data. Each part runs in a process of its own with its own
time limit and does not end the others. ``gpu.json`` and ``gpu.log`` in ``--output`` hold everything; targets are printed last.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Share of the time that each part may take at most.
SHARES = {
    "environment": 0.08, "tests": 0.2, "experiments": 0.35, "resume": 0.2, "training": 0.3, "profile": 0.15, "losses": 0.15,
    "mining": 0.1, "large": 0.15, "encoding": 0.2, "waits": 0.2,
}  # fmt: skip
# (part, metric) -> (target, whether less is better), for BERT-base's shape in bf16 with 32 tokens on an H100 or H200.
TARGETS = {
    ("training", "unsup 64 tercet ms"): (14, True),
    ("training", "unsup 512 tercet ms"): (40, True),
    ("training", "unsup 64 against sentence-transformers"): (3, False),
    ("training", "unsup 512 against sentence-transformers"): (3, False),
    ("training", "unsup 64 against bare loop, padded"): (2.5, False),
    ("training", "unsup 512 against bare loop, padded"): (2.5, False),
    ("training", "unsup 512 deterministic against torch's dropout"): (1.03, True),
    ("training", "masked LM, 57k tokens tercet ms"): (25, True),
    ("losses", "info_nce 65536 x 256 s"): (0.25, True),
    ("encoding", "against sentence-transformers"): (3, False),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU.")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--parts", nargs="*", choices=[*SHARES, "none"], default=list(SHARES))
    parser.add_argument("--pretrain", type=float, default=0.0, help="minutes of benchmarks.pretraining, at the end")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/gpu"))
    parser.add_argument("--part", choices=[*SHARES, "pretrain"], help="one part, in this process; prints JSON")
    return parser.parse_args()


def show(found: dict[str, Any]) -> None:
    """Print what a part has measured so far: the last line counts, also of a part that is stopped."""
    print(json.dumps(found), flush=True)


def environment(device: str) -> dict[str, Any]:
    """Versions and devices."""
    import torch
    import transformers

    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "cores": os.cpu_count(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_gb": properties.total_memory / 1e9, "bf16": torch.cuda.is_bf16_supported()}
        big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        found["matmul_tflops"] = 2 * 8192**3 / timed(lambda: big @ big, device, 20) / 1e12
    return found


def tests(device: str) -> dict[str, Any]:
    """The tests marked gpu; on a CPU they are skipped."""
    marked = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8")]
    given = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *marked]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    return {"exit_code": done.returncode, "result": (done.stdout.strip().splitlines() or [""])[-1]}


def command(name: str, *overrides: str) -> tuple[int, str]:
    """Run a command of the application in this process: its exit code and the last error line."""
    import contextlib
    import io

    from tercet.app.cli import main

    terminal, sys.argv = io.StringIO(), ["tercet", *overrides]
    with contextlib.redirect_stderr(terminal), contextlib.redirect_stdout(terminal):
        try:
            main(name)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
    text = terminal.getvalue()
    print(text[-1500:], file=sys.stderr)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    return code, errors[-1] if errors else ""


def small(device: str) -> list[str]:
    """Overrides that every short run shares."""
    where = ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed"] if device == "cuda" else ["trainer.accelerator=cpu"]
    return [
        *where,
        "trainer.max_steps=20",
        "trainer.max_epochs=-1",
        "logger=csv",
        "callback.embeddings=null",
        "measure_before=false",
    ]


NLI = ["model=bert_small", "data=nli_triplets"]
UNSUP, SUP = ["objective=simcse_unsup", *NLI], ["objective=simcse_sup", *NLI]
RUNS = {
    "unsupervised SimCSE": UNSUP,
    "supervised SimCSE, both directions": [*SUP, "loss.direction=both"],
    "supervised SimCSE, fp16": [*SUP, "trainer.precision=16-mixed"],
    "with masked-LM auxiliary": [*UNSUP, "objective.mlm.weight=0.1"],
    "recomputed, chunk_tokens=auto": [*SUP, "model.execution.recompute=true", "model.execution.chunk_tokens=auto"],
    "deterministic dropout": [*UNSUP, "model.execution.dropout=deterministic"],
    "mixed views": [*UNSUP, "view=mixed"],
    "cross-batch memory": [*SUP, "objective.memory.size=512", "objective.memory.warmup=5"],
    "masked LM": ["objective=mlm", *NLI],
    "FaceNet, images": ["experiment=facenet_lfw_small", "data.workers=2"],
    "FaceNet, texts": ["experiment=facenet_questions", "model=bert_small", "~test.reference"],
    "Quick-Thoughts, GRU": ["experiment=quick_thoughts_small", "data.held_out=2000"],
    "Quick-Thoughts, transformer": ["experiment=quick_thoughts_minilm", "model=bert_small", "data.held_out=2000"],
    "trainer=ddp, one device": [*SUP, "trainer=ddp", "trainer.devices=1"],
    "trainer=fsdp, one device": [*SUP, "trainer=fsdp", "trainer.devices=1"],
}  # fmt: skip


def experiments(device: str) -> dict[str, Any]:
    """Every objective for 20 steps, then an evaluation of the last one's model."""
    found: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp())
    for number, (name, overrides) in enumerate(RUNS.items()):
        if device == "cpu" and ("fp16" in name or "trainer=" in name or number > 2):
            continue
        start, output = time.perf_counter(), folder / str(number)
        evaluation = ["evaluation@test=stsb_dev"] if number == 0 else ["evaluation@test=none", "optimized_metric=null"]
        given = {o.split("=")[0]: o for o in [*small(device), *evaluation, *overrides] if not o.startswith("trainer=")}
        groups = [o for o in overrides if o.startswith("trainer=")]
        code, error = command("train", *groups, *given.values(), f"output_dir={output}")
        found[name] = {"exit_code": code, "seconds": time.perf_counter() - start, "error": error}
        if (metrics := output / "metrics.json").is_file():
            values = json.loads(metrics.read_text())
            found[name] |= {key: values[f"train/{key}"] for key in ("loss", "memory_gb") if f"train/{key}" in values}
        show(found)
    code, error = command("evaluate", f"model={folder / '0'}", "evaluation=stsb_dev", f"device={device}")
    found["evaluate"] = {"exit_code": code, "error": error}
    return found


def resume(device: str) -> dict[str, Any]:
    """A run that is killed and resumed ends with the weights of one that was not."""
    import torch

    folder, found = Path(tempfile.mkdtemp()), {}
    shared = ["objective=simcse_unsup", "model=bert_small", "data=nli_triplets", "evaluation@test=none", "save_every=2"]
    for dropout in ("torch", "deterministic"):
        base = [*small(device), *shared, f"model.execution.dropout={dropout}"]
        whole, pieces = folder / f"{dropout}-whole", folder / f"{dropout}-pieces"
        codes = [command("train", *base, f"output_dir={whole}")[0]]
        killed = [sys.executable, "train.py", *base, f"output_dir={pieces}"]
        process = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoint = pieces / "checkpoints" / "last.ckpt"
        while not checkpoint.is_file() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
        step = int(torch.load(checkpoint, weights_only=True)["global_step"])
        codes.append(command("train", *base, f"output_dir={pieces}", "resume=true")[0])
        one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (whole, pieces))
        same = all(torch.equal(value, other[key]) for key, value in one.items())
        found[dropout] = {"exit_codes": codes, "killed_after_step": step, "bit_identical": same}
        show(found)
    return found


class _Enough(Exception):  # noqa: N818 - it is no error
    pass


def free_running(start: Callable[[Callable[[], None]], Any], steps: int, warmup: int = 5) -> float:
    """Median seconds of a step of a loop that runs alone and is not made to wait for the device between steps.

    In ``warmup`` steps our CUDA graphs are captured, one for each size of a batch; a median leaves out rare sizes that follow.
    """
    from benchmarks.device import mark, seconds_between

    marks: list[Any] = []

    def tick() -> None:
        marks.append(mark())
        if len(marks) == warmup + steps:
            raise _Enough

    with suppress(_Enough):
        start(tick)
    return median(seconds_between(marks[warmup - 1 :]))


def training(device: str) -> dict[str, Any]:
    """A training step, ours and others', each alone."""
    from benchmarks.shapes import Task
    from benchmarks.trainers import ALL
    from benchmarks.training import texts

    cuda = device == "cuda"
    names = ["tercet", "bare loop, padded", "sentence-transformers", "transformers' Trainer", "tercet, torch's dropout",
             "tercet, no graphs", "tercet, encoder alone"]  # fmt: skip
    found: dict[str, Any] = {}
    for kind, batch in (("unsup", 64), ("unsup", 512), ("sup", 64), ("sup", 512)) if cuda else (("unsup", 8),):
        steps, warmup = ((60, 40) if batch == 64 else (20, 12)) if cuda else (2, 2)
        columns = texts(kind, min(batch * (steps + warmup), 23_000 if kind == "unsup" else 7_600))
        task = Task(columns, batch, "bert_base" if cuda else "minilm", device, half=cuda)
        for name in names if cuda else names[:2]:
            try:
                found[f"{kind} {batch} {name} ms"] = 1000 * free_running(ALL[name](task), steps, warmup)
            except Exception as error:
                found[f"{kind} {batch} {name}"] = f"{type(error).__name__}: {error}"[:300]
            show(found)
        for name in names[1:4]:
            ours, theirs = (found.get(f"{kind} {batch} {n} ms") for n in ("tercet", name))
            if ours and theirs:
                found[f"{kind} {batch} against {name}"] = theirs / ours
        own, drawn = (found.get(f"{kind} {batch} {name} ms") for name in ("tercet", "tercet, torch's dropout"))
        if own and drawn:
            found[f"{kind} {batch} deterministic against torch's dropout"] = own / drawn
    task = Task(texts("unsup", (4096 if cuda else 16) * 6), 4096 if cuda else 8, "minilm", device, half=cuda)
    start = masked_lm(task)
    found["masked LM, 57k tokens tercet ms"] = 1000 * free_running(start, 12 if cuda else 1, 6)
    return found


def masked_lm(task: Any) -> Callable[[Callable[[], None]], Any]:
    """Masked language modeling in the shape of MiniLM: 4,096 rows of 14 tokens are 57k."""
    from benchmarks.trainers import ours

    return ours(task, "objective=mlm", "~loss", "~model.pooling", "~model.normalize")


def profile(device: str) -> dict[str, Any]:
    """A step as the profiler sees it: host time, kernel time, launches, copies, waits."""
    from benchmarks.shapes import Task
    from benchmarks.trainers import ours
    from benchmarks.training import texts

    cuda, found = device == "cuda", {}
    for batch in (64, 512) if cuda else (8,):
        task = Task(texts("unsup", batch * 8), batch, "bert_base" if cuda else "minilm", device, half=cuda)
        averages = profiled(ours(task), cuda)
        calls = {row.key: row.count / STEPS for row in averages}
        # Operators and annotations repeat the time of the kernels inside them.
        kernel = [row for row in averages if row.device_type.name == "CUDA" and not row.is_user_annotation]
        kernels = sum(row.self_device_time_total for row in kernel) / STEPS / 1000
        found[str(batch)] = {"kernel_ms": kernels, **{name: calls[name] for name in CALLS if name in calls}}
        show(found)
        print(
            averages.table(sort_by="self_device_time_total" if cuda else "self_cpu_time_total", row_limit=15), file=sys.stderr
        )
    return found


OBJECTIVES = {
    "unsupervised": [],
    "mean pooling, both directions": ["model.pooling=mean", "loss.direction=both"],
    "hard negatives": ["objective=simcse_sup", "loss.hard_negative_weight=1"],
    "clipped and accumulated": ["trainer.gradient_clip_val=1", "trainer.accumulate_grad_batches=2"],
    "mixed views": ["view=mixed"],
    "masked-LM auxiliary": ["objective.mlm.weight=0.1"],
    "triplets": ["objective=facenet", "sampler=random", "~loss"],
    "torch's dropout": ["model.execution.dropout=torch"],
    "no graphs": ["model.execution.graphs=false"],
    "recomputed chunks": ["model.execution.recompute=true", "model.execution.chunk_tokens=512"],
}


def waits(device: str) -> dict[str, Any]:
    """How often the host waits for the device in a step whose values are not written: law 9 says never."""
    import warnings

    import torch

    from benchmarks.shapes import Task
    from benchmarks.trainers import ours
    from benchmarks.training import texts

    found: dict[str, Any] = {}
    for name, overrides in OBJECTIVES.items():
        columns = texts("sup" if "objective=simcse_sup" in overrides or "objective=facenet" in overrides else "unsup", 64 * 20)
        task, count = Task(columns, 64, "minilm", device, half=device == "cuda"), 0

        def tick() -> None:
            nonlocal count
            count += 1
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn" if 6 <= count < 12 else "default")
            if count == 12:
                raise _Enough

        with warnings.catch_warnings(record=True) as seen, suppress(_Enough):
            warnings.simplefilter("always")
            ours(task, *overrides)(tick)
        places = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
        found[name] = len(places) / 6
        show({**found, f"where, {name}": sorted(set(places))[:5]} if places else found)
    return found


STEPS = 5  # that are profiled, after as many that are not
CALLS = (
    "cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "cudaStreamSynchronize", "aten::copy_", "aten::arange",
    "aten::repeat_interleave", "aten::_local_scalar_dense", "aten::nonzero", "aten::index",
)  # fmt: skip


def profiled(start: Callable[[Callable[[], None]], Any], cuda: bool) -> Any:
    """The profiler's averages over some steps of a loop."""
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    recorder, count = torch.profiler.profile(activities=activities), 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == STEPS:
            recorder.start()
        if count == 2 * STEPS:
            if cuda:
                torch.cuda.synchronize()
            recorder.stop()
            raise _Enough

    with suppress(_Enough):
        start(tick)
    return recorder.key_averages()


def timed(function: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median seconds of a call."""
    from benchmarks.device import now

    function()
    times = []
    for _ in range(repeats):
        start = now()[0]
        function()
        times.append(now()[0] - start)
    return median(times)


def losses(device: str) -> dict[str, Any]:
    """InfoNCE alone, forward and backward, at D = 256."""
    import torch

    from tercet.losses import InfoNCE
    from tercet.types import Embeddings

    loss, found = InfoNCE().to(device), {}
    for n in (4096, 16384, 65536) if device == "cuda" else (256,):
        ids = torch.arange(n, device=device)
        z = torch.randn(2, n, 256, device=device, requires_grad=True)

        def step(z: Any = z, ids: Any = ids) -> None:
            rows = Embeddings(z, ids, torch.full_like(ids, -1), ids, torch.stack([ids, ids + len(ids)]))
            loss(rows, rows).loss_sum.backward()

        found[f"info_nce {n} x 256 s"] = timed(step, device, 3)
    return found


def mining(device: str) -> dict[str, Any]:
    """Semi-hard triplets, 40 rows of a label, d = 128."""
    import torch

    from tercet.losses import TripletLoss
    from tercet.types import Embeddings

    loss, found = TripletLoss(), {}
    for n in (1800, 16000) if device == "cuda" else (400,):
        ids = torch.arange(n, device=device)
        z = torch.randn(1, n, 128, device=device, requires_grad=True)

        def step(z: Any = z, ids: Any = ids) -> None:
            rows = Embeddings(z, ids, ids // 40, ids, ids[None])
            loss(rows, rows).loss_sum.backward()

        found[f"semihard {n} x 128 ms"] = 1000 * timed(step, device, 5)
    return found


def large(device: str) -> dict[str, Any]:
    """A batch beyond memory, recomputed in chunks."""
    from benchmarks.device import held
    from benchmarks.shapes import Task
    from benchmarks.texts import sentences
    from benchmarks.trainers import ours

    batch, chunk = (8192, 65536) if device == "cuda" else (32, 128)
    task = Task([sentences(batch)], batch, "bert_base" if device == "cuda" else "minilm", device, half=device == "cuda")
    more = ("model.execution.recompute=true", f"model.execution.chunk_tokens={chunk}")
    seconds = free_running(ours(task, *more), 3 if device == "cuda" else 1)
    return {"batch": batch, "chunk_tokens": chunk, "s": seconds, "peak_gib": held(device, most=True) / 2**30}


def encoding(device: str) -> dict[str, Any]:
    """Sentences a second, beside sentence-transformers at its best batch size."""
    import torch
    from sentence_transformers import SentenceTransformer

    from benchmarks.shapes import Task
    from benchmarks.texts import sentences
    from tercet.models import CachedEncoder
    from tercet.models.folder import load_folder

    count = 8000 if device == "cuda" else 64
    texts = sentences(count)
    folder = Task([texts], 1, "bert_base" if device == "cuda" else "minilm", device).folder
    encoder = load_folder(folder, "mean")[0].to(device).eval()
    peer = SentenceTransformer(folder, device=device)
    theirs = {
        size: count
        / timed(lambda s=size: peer.encode(texts, batch_size=s, show_progress_bar=False, convert_to_tensor=True), device, 2)
        for size in ((32, 128, 512) if device == "cuda" else (32,))
    }
    mine = count / timed(lambda: CachedEncoder(encoder)(texts), device, 2)
    apart = CachedEncoder(encoder)(texts[:64]).cpu() - peer.encode(texts[:64], convert_to_tensor=True).cpu()
    best = max(theirs.values())
    return {
        "tercet sentences/s": mine, "sentence-transformers sentences/s": theirs, "against sentence-transformers": mine / best,
        "apart_by": float(apart.abs().max()), "torch": torch.__version__,
    }  # fmt: skip


PARTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "environment": environment, "tests": tests, "experiments": experiments, "resume": resume, "training": training,
    "profile": profile, "losses": losses, "mining": mining, "large": large, "encoding": encoding, "waits": waits,
}  # fmt: skip


def run_part(name: str, options: argparse.Namespace, seconds: float, log: Any) -> dict[str, Any]:
    """A part in a process of its own: its result, or why there is none."""
    start = time.perf_counter()
    given = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--device", options.device]
    given += ["--pretrain", str(options.pretrain), "--output", str(options.output)]
    lines = options.output / f"{name}.jsonl"
    with lines.open("w") as stdout:
        try:
            code = subprocess.run(given, cwd=ROOT, stdout=stdout, stderr=log, timeout=seconds).returncode
            failed = {"failed": f"exit code {code}"} if code else {}
        except subprocess.TimeoutExpired:
            failed = {"failed": f"stopped after {seconds:.0f} s"}
    found = [line for line in lines.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    lines.unlink()
    return {**(json.loads(found[-1]) if found else {}), **failed, "seconds": time.perf_counter() - start}


def run_pretraining(options: argparse.Namespace) -> dict[str, Any]:
    """A base encoder, and contrastive training from it."""
    from benchmarks.pretraining import pretrain

    return pretrain(options.device, options.pretrain, options.output.absolute(), show)


def table(results: dict[str, Any]) -> str:
    """Every number, and the targets that are met and missed."""
    lines = []
    for part, result in results.items():
        lines.append(f"## {part}, {result['seconds']:.0f} s")
        lines += [f"  {key}: {_short(value)}" for key, value in result.items() if key != "seconds"]
    lines.append("## targets")
    for (part, metric), (target, less) in TARGETS.items():
        value = results.get(part, {}).get(metric)
        if isinstance(value, float):
            met = value <= target if less else value >= target
            lines.append(f"  {'met   ' if met else 'missed'} {metric}: {value:.3g} (target {'≤' if less else '≥'} {target})")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items() if inner not in ("", None))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """All parts, or one."""
    options = arguments()
    if options.part:
        try:
            result = run_pretraining(options) if options.part == "pretrain" else PARTS[options.part](options.device)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
        show(result)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    end = time.monotonic() + 60 * options.minutes
    with (options.output / "gpu.log").open("w") as log:
        for name in [*(part for part in options.parts if part in SHARES), *(["pretrain"] if options.pretrain else [])]:
            seconds = 60 * (1.5 * options.pretrain + 1)  # beside the minutes of the others
            if name != "pretrain":
                seconds = min(60 * options.minutes * SHARES[name], end - time.monotonic())
            if seconds < 5:
                results[name] = {"failed": "no time left", "seconds": 0.0}
                continue
            results[name] = run_part(name, options, seconds, log)
            (options.output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name}: {results[name]['seconds']:.0f} s {results[name].get('failed', '')}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()

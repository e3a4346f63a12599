"""A W&B run as it was written: its records."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7  # of LevelDB's log, which the file is


def records(path):
    """Every record of a ``.wandb`` file."""
    data, at, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


@dataclass
class Written:
    """What of it a user sees."""

    folder: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Path]] = field(default_factory=dict)  # type -> name in it -> file
    exit: int | None = None

    @property
    def keys(self):
        """Whatever has a history."""
        return {key for row in self.history for key in row}

    def media(self, key):
        """The files of a table or an image."""
        return sorted(p for p in (self.folder / "files" / "media").rglob(f"{key.split('/')[-1]}_*"))


def written(output):
    """The last run in a run's folder, once it is whole: a process of W&B's own writes it."""
    ends = time.monotonic() + 60
    while (found := _read(output)).exit is None and time.monotonic() < ends:
        time.sleep(0.2)
    return found


def _read(output):
    path = max((output / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns)
    found = Written(path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
        elif kind == "history":
            found.history.append(_values(record.history.item))
        elif kind == "summary":
            found.summary |= _values(record.summary.update)
        elif kind == "artifact":
            files = {e.path: Path(e.local_path) for e in record.artifact.manifest.contents}
            found.artifacts.setdefault(record.artifact.type, {}).update(files)
        elif kind == "exit":
            found.exit = record.exit.exit_code
        if kind in ("run", "config"):
            found.config |= _values((record.run.config if kind == "run" else record.config).update)
    return found


def _values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

"""The command ``encode``: vectors of all texts or images of a source, as a file or an index."""

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tercet.app import components, signals
from tercet.app.commands.evaluate import open_member
from tercet.errors import InputError, require
from tercet.messages import print_status
from tercet.models import Encoder
from tercet.paths import locate
from tercet.search import encode_index, encode_to
from tercet.search.encoding import count_encoded
from tercet.search.vectors import SUFFIXES


class SourceItems:
    """The cells of a source's first column, read when they are needed, as often as they are."""

    def __init__(self, source: Any) -> None:
        self.column = source.columns[0]
        names = {field.name for field in fields(source)} if is_dataclass(source) else set()
        whole = getattr(source, "split", None) == "all" and locate(str(getattr(source, "path", ""))).exists()
        if {"streaming", "label", "position"} <= names and whole:  # the same rows, which then need not fit into memory
            source = replace(source, streaming=True, label=None, position=None)
        self.rows = source.rows()

    def __iter__(self) -> Iterator[Any]:
        return (row[self.column] for row in self.rows)


def run(cfg: DictConfig, output: Path) -> None:
    """Write the file or the folder ``output``."""
    target = Path(cfg.output)
    is_file = target.suffix in SUFFIXES
    known = "a .npy or .parquet file, or a folder"
    require(is_file or not target.suffix or target.is_dir(), f"output={target}: {known} is needed, not {target.suffix}.")
    require(not is_file or cfg.kind == "exact", f"kind={cfg.kind} is of an index; output={target} is a file of vectors.")
    items = SourceItems(build_source(cfg))
    model: Any = OmegaConf.to_container(cfg.model)
    raw: Any = OmegaConf.to_container(components.raw_config())
    options: dict[str, Any] = {key: cfg[key] for key in ("num_processes", "device", "side", "precision")}
    found = locate(cfg.model.path)  # its name has to be good in any folder: an absolute path, or a hub id or package as it is
    options["name"] = os.path.abspath(found) if found.exists() else cfg.model.path
    signals.describe_stop(lambda: _describe_stop(target))
    try:
        if is_file:
            info = encode_to(partial(_open, model, raw), items, target, **options)
            shape = f"{info.count} x {info.dimension}"
            print_status(f"{shape}, {info.precision}. Written to {target}; `tercet search vectors={target}` indexes it.")
        else:
            index = encode_index(partial(_open, model, raw), items, target, cfg.kind, **options)
            print_status(f"{describe_index(index)}. `tercet search index={target} query=...` asks it.")
    except InputError as error:
        raise InputError(error.rename({"path": "`output`", "folder": "`output`", "items": "`data.path`"})) from error


def _describe_stop(target: Path) -> str:
    done, count = count_encoded(target)
    return f"; {done} of {count} are encoded and kept: the same command continues" if done else "; nothing is kept yet"


def describe_index(index: Any) -> str:
    """One line on an index: kind, size and measured recall."""
    settings = index.settings
    how = f"{settings.kind}, {settings.precision}, {len(index)} x {index.dim}, {index.similarity}"
    is_exact = (settings.kind, settings.precision) == ("exact", "float32")
    return f"{how}; recall@10 {index.recall:.4f} ({'all compared' if is_exact else 'measured against exact search'})"


def build_source(cfg: DictConfig) -> Any:
    """The source of ``data.train``, with all of its rows, also those that training holds out; another split stays."""
    train: Any = OmegaConf.to_container(cfg.data.train, resolve=True)
    components.check_values(OmegaConf.create({"data": {"train": train}}), cfg)
    source: Any = components.build(cfg.data.train)
    return replace(source, split="all") if getattr(source, "split", None) == "train" else source


def _open(model: dict[str, Any], raw: dict[str, Any], device: str) -> Encoder:
    """Open the model of the command, here or in a worker process."""
    components.start_record(OmegaConf.create(raw))
    return open_member(OmegaConf.create({"model": model, "device": device}), model["path"])

"""The job of ``python -m tercet evaluate``: measure any model, also one that was not trained here."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from tercet import record
from tercet.build import build
from tercet.console import quiet, say
from tercet.error import InputError
from tercet.model import Encoder, Encoding, TextEncoder
from tercet.model.checkpoint import load_encoder
from tercet.model.folder import load
from tercet.paths import locate, writable
from tercet.values import check_values


def run(cfg: DictConfig, output: Path) -> float | None:
    """Print the table; write the metrics where ``output`` says."""
    quiet()
    target = Path(cfg.output) if cfg.output else None
    if target is not None:
        if target.is_dir() or target.suffix != ".json":
            raise InputError(f"output={target}: the name of a .json file is needed.")
        writable(target.parent, "output")
    check_values(OmegaConf.create({"evaluation": OmegaConf.to_container(cfg.evaluation, resolve=True)}), cfg)
    evaluator = build(cfg.evaluation)
    encoder = open_model(cfg.model.path, cfg.model.pooling, cfg.device)
    if cfg.model.max_length:
        if not isinstance(encoder, TextEncoder):
            raise InputError(f"model.max_length={cfg.model.max_length} counts tokens; this model reads images.")
        encoder.max_length = cfg.model.max_length
    encode = Encoding(encoder, progress="evaluating")
    metrics = evaluator(encode)
    values = {f"test/{name}": value for name, value in metrics.items()}
    show = getattr(evaluator, "table", None)
    say(show(metrics) if show else "\n".join(f"{name}  {value:.4f}" for name, value in metrics.items()))
    if target is not None:
        record.metrics(target.parent, values, target.name)
        draw = getattr(evaluator, "figures", None)
        drawn = draw(encode) if draw else {}  # nothing is encoded twice
        for name, figure in drawn.items():
            figure.savefig(target.with_name(f"{target.stem}_{name}.png"), dpi=150)
        say(f"Written to {target}" + "".join(f", {target.stem}_{name}.png" for name in drawn))
    return None


def open_model(name: str, pooling: str | None, device: str) -> Encoder:
    """From a run's folder, a checkpoint, a model's folder, or the hub; on its device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device={device}, but torch sees no GPU here. Use device=cpu.")
    return _opened(name, pooling).to(device)


def _opened(name: str, pooling: str | None) -> Encoder:
    path = locate(name)
    if path.is_file():
        if pooling:
            raise InputError(f"model.pooling={pooling}: a checkpoint records its own pooling. Leave model.pooling out.")
        return load_encoder(path)
    if (path / "metrics.json").is_file() and not (path / "model").is_dir():
        raise InputError(
            f"model={name} is a run without a model folder: it did not finish. Use a file of its checkpoints/."
        )
    if path.is_dir() and (path / "config.yaml").is_file():
        name = str(path / "model") if (path / "model").is_dir() else _newest(path)
        if name.endswith(".ckpt"):
            return load_encoder(name)
    elif path.suffix == ".ckpt":
        raise InputError(f"model={name}: there is no such file.")
    encoder, known = load(name, pooling)
    say(f"pooling: {encoder.pooling} ({known})")
    return encoder


def _newest(run: Path) -> str:
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda p: (p.name != "best.ckpt", -p.stat().st_mtime))
    if not found:
        raise InputError(f"model={run} is a run without a model or a checkpoint: it stopped before its first one.")
    return str(found[0])

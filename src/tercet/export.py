"""The job of ``python -m tercet export``: an encoder as one ONNX file, in float32 or int8."""

from pathlib import Path

from omegaconf import DictConfig

from tercet.console import quiet, say
from tercet.model.exported import FILE, export
from tercet.open_model import open_model
from tercet.paths import new, writable


def run(cfg: DictConfig, output: Path) -> None:
    """Write the folder."""
    quiet()
    target = Path(cfg.output)
    new(target, "output")
    encoder = open_model(cfg.model.path, cfg.model.pooling, "cpu", cfg.seed)
    writable(target, "output")
    export(encoder, target, cfg.precision)
    size = (target / FILE).stat().st_size / 1e6
    say(f"{cfg.precision}, {size:.0f} MB. Written to {target}; python -m tercet evaluate model={target} measures it.")

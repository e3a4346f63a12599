"""The job of ``python -m tercet export``: an encoder as one ONNX file, in float32 or int8."""

from pathlib import Path

from omegaconf import DictConfig

from tercet.app.model_loading import open_model
from tercet.messages import print_status, silence_libraries
from tercet.models.onnx import FILE, export_onnx
from tercet.paths import check_new_folder, check_writable


def run(cfg: DictConfig, output: Path) -> None:
    """Write the folder."""
    silence_libraries()
    target = Path(cfg.output)
    check_new_folder(target, "output")
    encoder = open_model(cfg.model.path, cfg.model.pooling, "cpu", cfg.seed)
    check_writable(target, "output")
    export_onnx(encoder, target, cfg.precision)
    size = (target / FILE).stat().st_size / 1e6
    print_status(f"{cfg.precision}, {size:.0f} MB. Written to {target}; python -m tercet evaluate model={target} measures it.")

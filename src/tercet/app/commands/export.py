"""The commands ``export`` (an encoder as one ONNX file) and ``expand`` (a model of words learns more words)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from tercet.app.commands.evaluate import open_model
from tercet.errors import InputError
from tercet.messages import print_status, silence_libraries
from tercet.models.folder import save_model
from tercet.models.onnx import FILE, export_onnx
from tercet.models.vocabulary import expand_vocabulary
from tercet.models.words import read_vectors
from tercet.paths import check_new_folder, check_writable


def run(cfg: DictConfig, output: Path) -> None:
    """Write the folder of the ONNX file, in float32 or int8."""
    silence_libraries()
    target = Path(cfg.output)
    check_new_folder(target, "output")
    encoder = open_model(cfg.model.path, cfg.model.pooling, "cpu", cfg.seed, cfg.model.trust_remote_code)
    check_writable(target, "output")
    with about_model(cfg):
        export_onnx(encoder, target, cfg.precision)
    megabytes = (target / FILE).stat().st_size / 1e6
    print_status(f"{cfg.precision}, {megabytes:.0f} MB. Written to {target}; `tercet evaluate model={target}` measures it.")


@contextmanager
def about_model(cfg: DictConfig) -> Iterator[None]:
    """Put the model before messages that are about it, and name nothing else."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if error.parameters() else f"model={cfg.model.path}: {error}") from error


def expand(cfg: DictConfig, output: Path) -> None:
    """Write a model folder whose words are those of training and of a file of vectors (Quick-Thoughts, section 4)."""
    silence_libraries()
    target = Path(cfg.output)
    check_new_folder(target, "output")
    vectors = read_vectors(cfg.vectors, "vectors")
    opened = open_model(cfg.model.path, None, "cpu")
    with about_model(cfg):
        encoder, expansion = expand_vocabulary(opened, vectors)
    check_writable(target, "output")
    save_model(encoder, target)
    fit = f"fitted on {expansion.shared} shared ones (R² {' and '.join(f'{x:.3f}' for x in expansion.fit)})"
    print_status(f"{expansion.new} words are new; the map was {fit}. Written to {target}")

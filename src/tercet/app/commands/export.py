"""The commands ``export`` (an encoder for other runtimes) and ``expand`` (a model of words learns more words)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from tercet.app.commands.evaluate import open_model
from tercet.errors import InputError
from tercet.messages import print_status
from tercet.models.export import FILES, export_model
from tercet.models.folder import save_model
from tercet.models.vocabulary import expand_vocabulary
from tercet.models.words import read_vectors
from tercet.paths import check_new_folder, check_writable


def run(cfg: DictConfig, output: Path) -> None:
    """Write the folder of the exported file, and say how far its vectors are from the model's."""
    target = Path(cfg.output)
    check_new_folder(target, "output")
    encoder = open_model(cfg.model.path, cfg.model.pooling, "cpu", cfg.seed, cfg.model.trust_remote_code)
    check_writable(target, "output")
    with about_model(cfg):
        parity = export_model(encoder, target, cfg.format, cfg.precision, cfg.tolerance)
    file = target / FILES[cfg.format][cfg.precision]
    megabytes = sum(part.stat().st_size for part in file.parent.iterdir()) / 1e6
    most = f"{parity.difference:.2g} times their length at most, cosine {parity.cosine:.5f} at least"
    differ = f"Vectors of {parity.samples} samples differ from the model's by {most}"
    print_status(f"{cfg.format}, {cfg.precision}, {megabytes:.0f} MB. {differ}.")
    trust = " model.trust_remote_code=true" if cfg.format == "torch_export" else ""
    print_status(f"Written to {target}; `tercet evaluate model={target}{trust}` measures it.")


@contextmanager
def about_model(cfg: DictConfig) -> Iterator[None]:
    """Put the model before messages that are about it, and name nothing else."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if error.parameters() else f"model={cfg.model.path}: {error}") from error


def expand(cfg: DictConfig, output: Path) -> None:
    """Write a model folder whose words are those of training and of a file of vectors (Quick-Thoughts, section 4)."""
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

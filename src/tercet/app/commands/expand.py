"""The job of ``python -m tercet expand``: a model of words learns the words of larger vectors."""

from pathlib import Path

from omegaconf import DictConfig

from tercet.app.model_loading import open_model
from tercet.messages import print_status, silence_libraries
from tercet.models.folder import save_model
from tercet.models.vocabulary import expand_vocabulary
from tercet.models.words import read_vectors
from tercet.paths import check_new_folder, check_writable


def run(cfg: DictConfig, output: Path) -> None:
    """Fit the map, write the model's folder."""
    silence_libraries()
    target = Path(cfg.output)
    check_new_folder(target, "output")
    vectors = read_vectors(cfg.vectors, "vectors")
    made, done = expand_vocabulary(open_model(cfg.model.path, None, "cpu"), vectors)
    check_writable(target, "output")
    save_model(made, target)
    fit = " and ".join(f"{x:.3f}" for x in done.fit)
    print_status(f"{done.new} words are new; the map was fitted on {done.shared} shared ones (R² {fit}). Written to {target}")

"""The job of ``python -m tercet expand``: a model of words learns the words of larger vectors."""

from pathlib import Path

from omegaconf import DictConfig

from tercet.console import quiet, say
from tercet.model.expansion import expand
from tercet.model.folder import save
from tercet.model.vectors import read_vectors
from tercet.open_model import open_model
from tercet.paths import new, writable


def run(cfg: DictConfig, output: Path) -> None:
    """Fit the map, write the model's folder."""
    quiet()
    target = Path(cfg.output)
    new(target, "output")
    vectors = read_vectors(cfg.vectors, "vectors")
    made, done = expand(open_model(cfg.model.path, None, "cpu"), vectors)
    writable(target, "output")
    save(made, target)
    fit = " and ".join(f"{x:.3f}" for x in done.fit)
    say(f"{done.new} words are new; the map was fitted on {done.shared} shared ones (R² {fit}). Written to {target}")

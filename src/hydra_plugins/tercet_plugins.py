"""Register Tercet's sweeper and launcher: Hydra loads plugins from this package only."""

from tercet.app.sweeps import optuna, ray


class OptunaSweeper(optuna.OptunaSweeper):
    """``hydra/sweeper=optuna``."""


class RayLauncher(ray.RayLauncher):
    """``hydra/launcher=ray``."""

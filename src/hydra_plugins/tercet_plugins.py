"""Register Tercet's sweeper, launcher and search path: Hydra loads plugins from this package only."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from tercet.app.hydra_compat import plugin_folders
from tercet.app.sweeps import optuna, ray


class OptunaSweeper(optuna.OptunaSweeper):
    """``hydra/sweeper=optuna``."""


class RayLauncher(ray.RayLauncher):
    """``hydra/launcher=ray``."""


class TercetSearchPath(SearchPathPlugin):
    """The configuration folders of installed packages, found by the entry points ``tercet.conf``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add them behind Tercet's own."""
        for folder in plugin_folders():
            search_path.append("tercet.conf", f"file://{folder}")

"""The application: configuration, command line, commands, records and sweeps."""

from pathlib import Path


def config_folder() -> str:
    """The folder of the configuration: inside the installed package, or beside ``src`` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parents[1] / "conf")

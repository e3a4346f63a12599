"""What a request has to pass before it is read: host, key, and the size of its body."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

from tercet.serving.batching import QueueFullError
from tercet.serving.metrics import Metrics
from tercet.serving.service import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPEN = ("/health", "/health/live", "/health/ready", "/")  # answered without a key
FILES, DATA = "/page/", "/page/api/"  # the page's own files hold nothing to protect


class RequestError(Exception):
    """A request that is refused: the status, what is wrong, and the parameter."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_response(error: Exception) -> Response:
    """The answer to a refused request, in the shape of OpenAI's API."""
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(error.retry_after)
        error = RequestError(429, str(error), code="rate_limit_exceeded")
    if not isinstance(error, RequestError):
        error = RequestError(500, "The server has failed; its log says why.", code="internal_error")
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    body = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return JSONResponse({"error": body}, error.status, headers)


class Guard:
    """ASGI middleware: refuse a foreign host or key, read the body up to its limit, and measure the answer.

    ``hosts`` are the names that a request may ask for, None for any: a page of another site that has its own name point to
    127.0.0.1 is refused so. The application gets a body only when it is here as a whole.
    """

    def __init__(self, app: Any, limits: Limits, key: str | None, hosts: tuple[str, ...] | None, metrics: Metrics) -> None:
        self.app, self.limits, self.hosts, self.metrics = app, limits, hosts, metrics
        self.key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # the client has gone before the answer

        async def note_and_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
            body = await asyncio.wait_for(self._body(Headers(scope=scope), receive), self.limits.seconds)
            if body is not None:
                await self.app(scope, _replay(body, receive), note_and_send)
        except asyncio.TimeoutError:
            message = f"The body has not arrived within {self.limits.seconds} seconds."
            await error_response(RequestError(408, message))(scope, receive, note_and_send)
        except RequestError as error:
            await error_response(error)(scope, receive, note_and_send)
        finally:
            # The route's path as it was declared; "other" for what there is not: names of clients make no new metrics.
            route = str(getattr(scope.get("route"), "path", "other"))
            self.metrics.observe_request(route, status, time.monotonic() - start)

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else headers["host"]
        if self.hosts is not None and host not in self.hosts:
            raise RequestError(403, "This server answers requests to localhost only.", code="host_not_allowed")
        is_open = path in OPEN or (path.startswith(FILES) and not path.startswith(DATA))
        given = headers.get("authorization", "").encode("latin-1")
        if self.key is not None and not is_open and not hmac.compare_digest(given, self.key):
            raise RequestError(401, "Give the server's key as `Authorization: Bearer KEY`.", code="invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None if the client goes before it is here."""
        body, more = bytearray(), True
        length = headers.get("content-length", "")
        self._check_size(int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0)
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            self._check_size(len(body))
            more = message.get("more_body", False)
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self.limits.body:
            raise RequestError(413, f"A body may have {self.limits.body} bytes.", code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def receive_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body

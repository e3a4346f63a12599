"""A tiny model behind a real server on 127.0.0.1, which runs in a thread of the tests' process."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch

from tercet.app.components import build
from tests.conftest import TEXTS, composed, tiny

uvicorn = pytest.importorskip("uvicorn", reason="tercet[serve] is not installed")


class Nearest:
    """A stand-in for ``tercet.search.Index``: exact search over TEXTS."""

    def __init__(self, model):
        self.z = model.encode(TEXTS).numpy()
        self.z /= np.linalg.norm(self.z, axis=1, keepdims=True)

    def search(self, queries, k):
        scores = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ self.z.T
        rows = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, rows, 1), rows

    def texts(self, rows):
        return [TEXTS[row] for row in rows]


@contextmanager
def served(app):
    """The address of the application, while it is served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        ends = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < ends:
            time.sleep(0.01)
        assert server.started
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def model():
    """A tiny encoder; the same weights every time."""
    torch.manual_seed(0)
    return build(composed(*tiny()).model).eval()


@pytest.fixture(scope="module")  # not longer: other tests fork this process
def place(model):
    """The address of a server of the tiny model, with an index of TEXTS."""
    from tercet.serving import Limits, create_app

    limits = Limits(body=20_000, texts=64, characters=2000, queue=1000)
    with served(create_app(model, Nearest(model), limits=limits, latency_ms=2, name="tiny")) as address:
        yield address


@pytest.fixture
def client(place):
    """An HTTP client of the server."""
    with httpx.Client(base_url=place, timeout=60) as client:
        yield client

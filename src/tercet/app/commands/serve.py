"""The command ``serve``: a model behind OpenAI's API, in one process or several, until it is stopped."""

import os
import socket
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from tercet.app import signals
from tercet.app.commands.evaluate import open_model, open_with_note
from tercet.app.components import build
from tercet.app.run_files import is_run
from tercet.errors import InputError, require
from tercet.messages import print_status
from tercet.models import Encoder
from tercet.paths import locate
from tercet.serving import Limits, create_app, require_serving

if TYPE_CHECKING:
    from fastapi import FastAPI

LOCAL = ("127.0.0.1", "localhost", "::1")
METRICS = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus-client when it is imported


@dataclass(frozen=True)
class Settings:
    """What a process needs to make the application; it can be pickled."""

    model: str
    pooling: str | None
    trust_remote_code: bool
    device: str
    index: str | None
    threads: int
    options: dict[str, Any]

    def make_app(self, model: Encoder | None = None) -> "FastAPI":
        """Load the model, unless it is given, and the index."""
        torch.set_num_threads(self.threads)
        if model is None:  # in a process of its own; the first one has told the note
            model, _ = open_with_note(self.model, self.pooling, self.device, trust_remote_code=self.trust_remote_code)
        return create_app(model, open_index(self.index, model) if self.index else None, **self.options)


def run(cfg: DictConfig, output: Path) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what has arrived."""
    require_serving()
    settings = serving_settings(cfg, build(cfg.limits))
    model = open_model(settings.model, settings.pooling, settings.device, trust_remote_code=settings.trust_remote_code)
    app = settings.make_app(model)  # an error is told once, before there are workers
    with listen(cfg.host, cfg.port) as listener:
        place = address(cfg.host, listener)
        if cfg.workers > 1:
            app.state.service.batcher.close()
            del app, model  # each worker loads its own
            with tempfile.TemporaryDirectory(prefix="tercet-metrics-") as folder:
                os.environ[METRICS] = folder
                try:
                    serve_by_workers(settings, listener, cfg.workers, place)
                finally:
                    del os.environ[METRICS]
        else:
            serve_app(app, settings.options["limits"], listener, place)


def serving_settings(cfg: DictConfig, limits: Limits) -> Settings:
    """The configuration as plain values."""
    require(isinstance(cfg.model.path, str), f"model={cfg.model.path}: serve takes one model.")
    model, names = cfg.model, model_names(cfg.model.path)
    name, local = cfg.served_name or names[0], cfg.host in LOCAL
    options = {"limits": limits, "latency_ms": cfg.latency_ms, "key": cfg.key, "name": name, "local": local}
    options["other_names"] = names
    threads = max(1, torch.get_num_threads() // cfg.workers)
    return Settings(model.path, model.pooling, model.trust_remote_code, cfg.device, cfg.index, threads, options)


def model_names(path: str) -> list[str]:
    """What clients may call a model: the last part of its path, the run's id where it lies in a run, and the path as given."""
    given = Path(path)
    of_run = [folder.name for folder in list(given.parents)[:2] if is_run(locate(str(folder)))]
    return [given.name, *of_run, path.rstrip("/")]


def listen(host: str, port: int) -> socket.socket:
    """The socket that clients connect to."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        advice = "Give another port, or an address of this machine."
        raise InputError(f"host={host}, port={port}: {error.strerror or error}. {advice}") from error


def address(host: str, listener: socket.socket) -> str:
    """The address that a browser or client is given."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def serve_app(app: "FastAPI", limits: Limits, listener: socket.socket, place: str) -> None:
    """Serve from this process; a signal is handed to its handler when all that has arrived is answered."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                path = "/v1" if app.state.service else "/"  # a model of images has the page alone
                print_status(f"{app.state.name} is served at {place}{path}. Ctrl-C stops it.")

    Server(_config(app, limits)).run(sockets=[listener])
    require(app.state.was_ready, "The server has not started; the reason stands above.")


def serve_by_workers(settings: Settings, listener: socket.socket, workers: int, place: str) -> None:
    """Serve from several processes, of which each loads the model. One that dies is replaced."""
    from prometheus_client.multiprocess import mark_process_dead
    from uvicorn.supervisors import Multiprocess

    class Workers(Multiprocess):
        stopped_by = 0

        def handle_int(self) -> None:
            self._stop(signals.INTERRUPTED)
            super().handle_int()

        def handle_term(self) -> None:
            self._stop(signals.TERMINATED)
            super().handle_term()

        def keep_subprocess_alive(self) -> None:
            before = {process.pid for process in self.processes}
            super().keep_subprocess_alive()
            for pid in before - {process.pid for process in self.processes}:
                mark_process_dead(pid)  # type: ignore[no-untyped-call]

        def _stop(self, code: int) -> None:
            self.stopped_by = code
            listener.close()  # the workers close theirs

    config = _config(partial(Settings.make_app, settings), settings.options["limits"], workers=workers, factory=True)
    supervisor = Workers(config, sockets=[listener])
    print_status(f"{settings.options['name']} is served at {place}/v1 by {workers} processes. Ctrl-C stops them.")
    supervisor.run()
    if supervisor.stopped_by == signals.INTERRUPTED:
        raise KeyboardInterrupt
    require(supervisor.stopped_by, "A worker process could not start; the reason stands above.")
    raise SystemExit(supervisor.stopped_by)


def _config(app: Any, limits: Limits, **options: Any) -> Any:
    import uvicorn

    return uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", server_header=False, limit_concurrency=limits.connections,
        timeout_keep_alive=75,  # longer than clients keep idle connections: one that closes just now may be asked in vain
        timeout_graceful_shutdown=limits.seconds, timeout_worker_healthcheck=60, **options,
    )  # fmt: skip


def open_index(folder: str, model: Encoder) -> Any:
    """The index in a folder; ``InputError`` where another model has made its vectors."""
    from tercet.search import Index, check_same_model

    index = Index.load(folder)
    check_same_model(model, index.settings.signature, index.model)
    return index

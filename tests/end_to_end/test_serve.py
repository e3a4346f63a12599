"""``tercet serve``: the command, its signals and its errors."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tercet.app.commands.app import read_collection
from tercet.app.components import build
from tercet.images import PixelFormat
from tercet.models import ImageEncoder, random_backbone
from tercet.models.folder import save_model
from tercet.search.signature import make_signature
from tests.conftest import TEXTS, composed, tiny
from tests.end_to_end.forked import Forked

pytest.importorskip("uvicorn", reason="tercet[serve] is not installed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    model = build(composed(*tiny()).model).eval()
    save_model(model, folder)
    return folder, model


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def ended(started):
    """Kill the server where a test fails: the tests' process would wait for it."""
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def is_ready(place):
    try:
        return httpx.get(f"{place}/health/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_it_serves_until_a_signal_and_answers_what_has_arrived(saved, tmp_path, number, code):
    folder, model = saved
    port = free_port()
    place = f"http://127.0.0.1:{port}"
    with ended(Forked(tmp_path, "serve", [f"model={folder}", f"port={port}", "latency_ms=10000"])) as started:
        started.wait_for(lambda: is_ready(place), 120)
        assert f"model is served at {place}/v1" in started.said()
        with ThreadPoolExecutor(4) as pool, httpx.Client(timeout=60) as client:
            given = {"input": TEXTS, "model": "model"}
            asked = [pool.submit(client.post, f"{place}/v1/embeddings", json=given) for _ in range(4)]
            # all wait for others to be encoded with them
            started.wait_for(lambda: client.get(f"{place}/health").json()["queued"] == 4 * len(TEXTS))
            os.kill(started.pid, number)
            answers = [future.result() for future in asked]
        assert started.end() == code, started.said()
        assert "stopped" in started.said() and "Traceback" not in started.said()
    for answer in answers:
        assert answer.status_code == 200
        found = [item["embedding"] for item in answer.json()["data"]]
        np.testing.assert_allclose(found, model.encode(TEXTS).numpy(), atol=1e-4)


@pytest.mark.slow
def test_several_workers_share_metrics_a_dead_one_is_replaced_and_a_signal_ends_all(saved, tmp_path):
    port = free_port()
    place, given = f"http://127.0.0.1:{port}", {"input": "a"}
    command = [sys.executable, "-m", "tercet", "serve", f"model={saved[0]}", f"port={port}", "workers=2", "latency_ms=500"]
    started = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        ends = time.monotonic() + 240
        while len(workers := worker_pids(started.pid)) < 2 or not is_ready(place):
            assert time.monotonic() < ends and started.poll() is None
            time.sleep(0.1)
        for _ in range(40):  # each by a connection of its own: both processes accept some
            assert httpx.post(f"{place}/v1/embeddings", json=given, timeout=60).status_code == 200
        line = 'tercet_requests_total{route="/v1/embeddings",status="200"} 40.0'
        assert all(line in httpx.get(f"{place}/metrics", timeout=60).text for _ in range(6))
        os.kill(workers[0], signal.SIGKILL)
        time.sleep(1)
        for _ in range(10):
            assert httpx.post(f"{place}/v1/embeddings", json=given, timeout=60).status_code == 200
        with ThreadPoolExecutor(4) as pool, httpx.Client(timeout=60) as client:
            asked = [pool.submit(client.post, f"{place}/v1/embeddings", json=given) for _ in range(4)]
            time.sleep(0.3)
            started.send_signal(signal.SIGTERM)
            assert [future.result().status_code for future in asked] == [200] * 4
        assert started.wait(60) == 143
    finally:
        started.kill()
    assert "by 2 processes" in started.stderr.read()


def worker_pids(pid):
    """The processes that a server has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    return [child for child in children if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("port=taken", "Address already in use"),
        ("host=203.0.113.7", "host=203.0.113.7"),
        ("port=70000", "port=70000: a number from 0 to 65535"),
        ("workers=0", "workers=0"),
        ("latency_ms=-1", "latency_ms=-1"),
        ("limits.texts=0", "limits.texts=0"),
        ("limits.queue=10", "limits.texts=2048"),
        ("index=nowhere", "nowhere"),
        ("model.path=[a,b]", "one model"),
        ("model=nowhere/at/all", "model=nowhere/at/all"),
        ("limits.bytes=1", "limits.bytes"),
    ],
)
def test_wrong_settings_end_with_one_message(command, saved, override, message):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        override = override.replace("taken", str(listener.getsockname()[1]))
        result = command("serve", f"model={saved[0]}", override)
    assert result.code == 1 and message in result.terminal and "Traceback" not in result.terminal, result.terminal


def test_the_page_of_two_models_and_of_runs(saved, tmp_path):
    (tmp_path / "pairs.csv").write_text("a,b\n" + "".join(f"{text},{text} too\n".replace(", ", " ") for text in TEXTS))
    run = tmp_path / "outputs" / "mine" / "1"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: mine\nseed: 1\ncommand: [seed=1]\n")
    (run / "metrics.csv").write_text("step,train/loss\n0,2.0\n1,nan\n2,1.0\n")
    port = free_port()
    place = f"http://127.0.0.1:{port}"
    data = ["data=table", f"data.path={tmp_path / 'pairs.csv'}", "data.columns=[a,b]"]
    overrides = [f"model={saved[0]}", f"other={saved[0]}", f"port={port}", "latency_ms=0", "split=train", *data]
    with ended(Forked(tmp_path, "app", overrides)) as started, httpx.Client(base_url=place, timeout=60) as client:
        started.wait_for(lambda: is_ready(place), 120)
        seen = client.get("/page/api/info").json()
        assert seen.pop("count") >= 16
        assert seen == {
            "models": [str(saved[0])] * 2,
            "labels": ["a", "b"],
            "part": " of 24 texts (without held-out rows; split=test shows them)",
            "kind": "pairs",
            "runs": True,
            "search": True,
            "images": None,
        }
        found = client.post("/page/api/neighbors", json={"text": TEXTS[3]}).json()["hits"]
        assert [hit["row"] for hit in found[0]] == [hit["row"] for hit in found[1]] and len(found[0]) == 10
        (listed,) = client.get("/page/api/runs").json()
        assert (listed["id"], listed["name"]) == ("mine/1", "mine")
        assert client.get("/page/api/curves?run=mine/1").json() == {"train/loss": [[0, 2], [2, 1]]}
        assert client.get("/page/api/curves?run=../..").status_code == 400
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
        os.kill(started.pid, signal.SIGTERM)
        assert started.end() == 143, started.said()
        assert f"{seen['part']}. The page: {place}/" in started.said()


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("images") / "model"
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    backbone = random_backbone({"model_type": "resnet", "num_channels": 1, **sizes})
    save_model(ImageEncoder(backbone, PixelFormat(16, 1, mean=[0.5], std=[0.25])).eval(), folder)
    return folder


def drawn(shade):
    file = io.BytesIO()
    Image.new("L", (30, 20), shade).save(file, "png")
    return file.getvalue()


def test_the_page_of_images_in_parquet(image_model, tmp_path):
    cells = [drawn(5 * row) if row != 3 else b"no image" for row in range(40)]
    pq.write_table(pa.table({"photo": cells, "person": [f"P{row % 4}" for row in range(40)]}), tmp_path / "faces.parquet")
    place = f"http://127.0.0.1:{(port := free_port())}"
    data = ["data=images", f"data.path={tmp_path / 'faces.parquet'}", "data.held_out=0", "outputs=null"]
    overrides = [f"model={image_model}", f"other={image_model}", f"port={port}", *data]
    with ended(Forked(tmp_path, "app", overrides)) as started, httpx.Client(base_url=place, timeout=60) as client:
        started.wait_for(lambda: is_ready(place), 120)
        seen = client.get("/page/api/info").json()
        assert (seen["count"], seen["labels"], seen["search"]) == (39, ["P0", "P1", "P2", "P3"], False) and seen["images"]
        assert client.get("/page/api/items?rows=3").json() == [{"row": 3, "text": "image 4", "label": "P0"}]
        shown = Image.open(io.BytesIO(client.get("/page/api/image/38").content))
        assert shown.size == (30, 20) and shown.getpixel((5, 5)) == pytest.approx((195,) * 3, abs=4)
        assert client.get("/page/api/image/39").status_code == 404
        assert client.get("/page/api/changed").json()[0]["shared"] == 10
        os.kill(started.pid, signal.SIGTERM)
        assert started.end() == 143, started.said()
    assert f"39 images. The page: {place}/" in started.said() and "1 of 40 images cannot be used" in started.said()


def test_images_of_a_folder_are_read_when_they_are_needed(tmp_path):
    for row in range(30):
        file = tmp_path / "people" / f"P{row % 3}" / f"{row:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(drawn(row))
    overrides = ["model.path=m", "data=images", f"data.path={tmp_path / 'people'}", "data.held_out=0", "points=10"]
    made = read_collection(composed(*overrides, entry="app"))
    assert len(made.texts) == 10 and made.texts[0] == "00.png" and made.labels[0] == "P0" and made.labels[-1] == "P2"
    for row in range(10):
        cell = made.read_cell(row)
        assert cell["bytes"] is None and Path(cell["path"]).name == made.texts[row]
        assert made.labels[row] == Path(cell["path"]).parent.name


def test_a_model_of_texts_is_not_shown_images(command, saved, image_model, tmp_path):
    (tmp_path / "images").mkdir()
    for row in range(10):
        (tmp_path / "images" / f"{row}.png").write_bytes(drawn(row))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    images = ["data=images", f"data.path={tmp_path / 'images'}", "data.held_out=0"]
    texts = ["data=table", f"data.path={tmp_path / 'texts.txt'}", "data.columns=[text]"]
    for overrides, message in (
        ([f"model={saved[0]}", *images], "reads texts, but data holds images"),
        ([f"model={image_model}", f"other={saved[0]}", *images], f"other={saved[0]} reads texts, but data holds images"),
        ([f"model={image_model}", *texts], "reads images, but data holds texts"),
        ([f"model={image_model}", *images, "index=any"], "index=any is searched by texts"),
    ):
        result = command("app", *overrides)
        assert result.code == 1 and message in result.terminal and "Traceback" not in result.terminal, result.terminal


@pytest.mark.parametrize(
    ("override", "message"),
    [("workers=2", "workers=2"), ("points=1", "points=1"), ("projection=map", "projection=map: choose one of pca, tsne"),
     ("split=all", "split=all"), ("other=nowhere/at/all", "nowhere/at/all"), ("data.path=missing.csv", "missing.csv")],
)  # fmt: skip
def test_wrong_settings_of_the_page(command, saved, tmp_path, override, message):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    result = command(
        "app", f"model={saved[0]}", "data=table", f"data.path={tmp_path / 'texts.txt'}", "data.columns=[text]", override
    )
    assert result.code == 1 and message in result.terminal and "Traceback" not in result.terminal, result.terminal


def test_an_index_of_another_model_is_refused(command, saved, tmp_path):
    pytest.importorskip("faiss")
    from tercet.search import Index

    turned = torch.tensor(make_signature(saved[1])).flip(1).tolist()
    Index.build(np.eye(4, dtype=np.float32), list("abcd"), model="other", signature=turned).save(tmp_path / "index")
    result = command("serve", f"model={saved[0]}", f"index={tmp_path}/index")
    assert result.code == 1 and "gives other vectors" in result.terminal and "made by other" in result.terminal, result.terminal

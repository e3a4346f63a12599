"""A real server on 127.0.0.1 with real clients: OpenAI's, and plain HTTP."""

import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from tercet.errors import InputError
from tercet.models import CachedEncoder
from tercet.models.pooling import LayeredHead
from tercet.models.prompts import Prompts
from tercet.serving import Limits, create_app
from tests.conftest import TEXTS
from tests.serving.conftest import Nearest, served

openai = pytest.importorskip("openai", reason="the client is not installed")
JSON = {"content-type": "application/json"}


@pytest.fixture
def api(place):
    with openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_openais_client_gets_the_vectors_of_encode(api, model):
    expected = model.encode(TEXTS).numpy()
    for encoding in ("float", "base64", openai.NOT_GIVEN):
        answer = api.embeddings.create(model="tiny", input=TEXTS, encoding_format=encoding)
        assert [item.index for item in answer.data] == list(range(len(TEXTS))) and answer.model == "tiny"
        assert {type(item.embedding) for item in answer.data} == ({str} if encoding == "base64" else {list})
        found = [base64.b64decode(x.embedding) if encoding == "base64" else x.embedding for x in answer.data]
        found = [np.frombuffer(x, "<f4") if isinstance(x, bytes) else x for x in found]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        tokens = sum(len(ids) for ids in model.tokenizer(TEXTS)["input_ids"])
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    one = api.embeddings.create(model="tiny", input=TEXTS[0])
    np.testing.assert_allclose([one.data[0].embedding], expected[:1], atol=1e-5)


def test_token_ids_are_read_as_the_models_own(api, model):
    ids = model.tokenizer(TEXTS)["input_ids"]
    answer = api.embeddings.create(model="tiny", input=ids)
    np.testing.assert_allclose([x.embedding for x in answer.data], model.encode(TEXTS).numpy(), atol=1e-5)
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    one = api.embeddings.create(model="tiny", input=ids[0])
    np.testing.assert_allclose(one.data[0].embedding, model.encode(TEXTS[:1]).numpy()[0], atol=1e-5)


def test_models(api):
    assert [item.id for item in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other")


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": ["a"] * 65}, 400, "input"),
        ({"input": "a" * 2001}, 400, "input"),
        ({"input": [1, -1]}, 400, "input"),
        ({"input": [[]]}, 400, "input"),
        ({"input": [[1] * 4000]}, 400, "input"),
        ({"input": [10**9]}, 400, "input"),
        ({"input": [1.5]}, 400, "input"),
        ({"input": None}, 400, "input"),
        ({}, 400, "input"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "a", "dimensions": 4}, 400, "dimensions"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions"),
        ([], 400, None),
    ],
)
def test_a_refused_request_has_openais_error_object(client, given, status, param):
    answer = client.post("/v1/embeddings", json=given)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error"), error
    assert error["message"]


def test_bad_bodies_and_paths(client):
    for content, headers in ((b"{", JSON), (b"[" * 9000, JSON), (b"\xff", JSON), (b'{"input":"a"}', {}), (b"", JSON)):
        assert client.post("/v1/embeddings", content=content, headers=headers).status_code == 400
    half = client.post("/v1/embeddings", content=b'{"input":"\\ud800"}', headers=JSON)
    assert half.status_code == 400 and "surrogate" in half.text
    assert client.get("/nowhere").status_code == 404
    refused = client.get("/v1/embeddings")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_a_body_is_bounded_whether_its_length_is_told_or_not(client, place):
    large = client.post("/v1/embeddings", content=b"x" * 20_001, headers=JSON)
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    host, port = place.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.sendall((b"1000\r\n" + b"x" * 4096 + b"\r\n") * 5)  # and no end: the answer does not wait for it
        answer = raw.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")


def test_similarity_is_the_cosine(client, model):
    answer = client.post("/similarity", json={"first": TEXTS[:2], "second": TEXTS[:3]}).json()
    z = model.encode(TEXTS[:3], normalize=True).numpy()
    np.testing.assert_allclose(answer["scores"], z[:2] @ z.T, atol=1e-5)
    assert answer["similarity"] == "cosine"
    assert client.post("/similarity", json={"first": "a", "second": []}).json()["error"]["param"] == "second"


def test_health_and_metrics(client):
    assert client.get("/health/live").json() == {"status": "live"}
    assert (
        client.get("/health/ready").json() == client.get("/health").json() == {"status": "ready", "model": "tiny", "queued": 0}
    )
    client.post("/v1/embeddings", json={"input": "a b c"})
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(lines['tercet_requests_total{route="/v1/embeddings",status="200"}']) >= 1
    assert float(lines["tercet_tokens_total"]) >= 5 and float(lines["tercet_batch_texts_count"]) >= 1
    assert float(lines["tercet_queued_texts"]) == 0
    client.get("/a-name-of-my-own")
    assert 'route="other"' in client.get("/metrics").text and "a-name" not in client.get("/metrics").text


def test_only_local_names_are_answered(client):
    for host, status in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403), ("", 403)):
        assert client.get("/health", headers={"host": host}).status_code == status, host


def test_a_key_is_asked_for(model):
    with served(create_app(model, key="secret", latency_ms=0)) as place, httpx.Client(base_url=place) as client:
        given = {"input": "a"}
        assert client.get("/health/live").status_code == 200
        for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": b"Bearer \xe9"}, {"authorization": "secret"}):
            answer = client.post("/v1/embeddings", json=given, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/metrics", headers=headers).status_code == 401
        missing = client.post("/search", json={"query": "a"}, headers={"authorization": "Bearer secret"})
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "no_index"
        with openai.OpenAI(base_url=f"{place}/v1", api_key="secret") as api:
            assert api.embeddings.create(model="tercet", input="a").data


def test_search(client):
    found = client.post("/search", json={"query": [TEXTS[3], TEXTS[5]], "k": 2}).json()["results"]
    assert [hits[0]["row"] for hits in found] == [3, 5] and [len(hits) for hits in found] == [2, 2]
    assert found[0][0]["text"] == TEXTS[3] and found[0][0]["score"] == pytest.approx(1, abs=1e-5)
    assert client.post("/search", json={"query": "a", "k": 0}).json()["error"]["param"] == "k"


def test_a_query_has_the_prompt_of_queries(model):
    seen = []

    class Seen(Nearest):
        def search(self, queries, k):
            seen.append(queries)
            return super().search(queries, k)

    model.prompts = Prompts.of(["query: ", "passage: "])
    try:
        app = create_app(model, Seen(model), latency_ms=0)
        with served(app) as place:
            httpx.post(f"{place}/search", json={"query": TEXTS[0]})
        expected = CachedEncoder(model, distributed=False).for_column(0)(TEXTS[:1])
    finally:
        model.prompts = Prompts()
    np.testing.assert_allclose(seen[-1], expected.numpy(), atol=1e-5)


def test_dimensions_where_the_model_was_made_to_be_cut(model):
    head = model.head
    model.head = LayeredHead([{"type": "Truncate", "dim": 16}])
    model.head.build(32, 0.02)
    try:
        with served(create_app(model, latency_ms=0)) as place, httpx.Client(base_url=place) as client:
            whole, short = (
                client.post("/v1/embeddings", json={"input": "a man", **more}).json()["data"][0]["embedding"]
                for more in ({}, {"dimensions": 4})
            )
            assert len(whole) == 16 and len(short) == 4
            scale = np.linalg.norm(whole) / np.linalg.norm(whole[:4])
            np.testing.assert_allclose(short, np.array(whole[:4]) * scale, rtol=1e-4)
            assert client.post("/v1/embeddings", json={"input": "a", "dimensions": 17}).status_code == 400
    finally:
        model.head = head


def test_a_full_queue_is_answered_429_and_nothing_else_is_lost(model):
    app = create_app(model, latency_ms=0, limits=Limits(texts=4, queue=8))
    inner, go = app.state.service.batcher.encode, threading.Event()

    def slow(rows):
        assert go.wait(30)
        return inner(rows)

    with ThreadPoolExecutor(16) as pool, httpx.Client(timeout=60) as client:
        go.set()
        with served(app) as place:
            app.state.service.batcher.encode = slow
            go.clear()
            asked = [pool.submit(client.post, f"{place}/v1/embeddings", json={"input": ["a"] * 4}) for _ in range(12)]
            ends = time.monotonic() + 20
            while sum(future.done() for future in asked) < 8 and time.monotonic() < ends:
                time.sleep(0.01)
            go.set()
            answers = [future.result() for future in asked]
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 429} and codes.count(200) in (3, 4)
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


def test_a_stopping_server_answers_what_has_arrived(model):
    app = create_app(model, latency_ms=0)
    inner, asked = app.state.service.batcher.encode, threading.Event()

    def slow(rows):
        asked.set()
        time.sleep(0.5)
        return inner(rows)

    with ThreadPoolExecutor(1) as pool:
        with served(app) as place:
            app.state.service.batcher.encode = slow
            asked.clear()
            future = pool.submit(httpx.post, f"{place}/v1/embeddings", json={"input": TEXTS[:1]}, timeout=60)
            assert asked.wait(20)
        assert future.result().status_code == 200  # the server has stopped by now
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{place}/health")


def test_an_error_of_the_model_is_500_without_its_words(model):
    app = create_app(model, latency_ms=0)
    with served(app) as place:

        def broken(rows):
            raise RuntimeError("a secret path")

        app.state.service.batcher.encode = broken
        answer = httpx.post(f"{place}/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text


@pytest.mark.slow  # exporting takes most of the time
def test_an_exported_model_is_served(model, tmp_path):
    pytest.importorskip("onnxscript", reason="tercet[export] is not installed")
    import tercet
    from tercet.models.export import export_model

    export_model(model, tmp_path / "onnx")
    exported = tercet.load(tmp_path / "onnx")
    ids = model.tokenizer(TEXTS[:2])["input_ids"]
    with served(create_app(exported, latency_ms=0)) as place, httpx.Client(base_url=place, timeout=60) as client:
        for given in (TEXTS[:2], ids):
            data = client.post("/v1/embeddings", json={"input": given}).json()["data"]
            np.testing.assert_allclose([x["embedding"] for x in data], model.encode(TEXTS[:2]).numpy(), atol=1e-4)


def test_settings_are_checked(model):
    for wrong, name in ((dict(latency_ms=-1), "latency_ms"), (dict(key=""), "key")):
        with pytest.raises(InputError, match=name):
            create_app(model, **wrong)
    for wrong in ({"texts": 0}, {"body": 1.5}, {"texts": 10, "queue": 5}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Limits(**wrong)


def test_the_answer_is_json_that_others_read_too(client):
    raw = client.post("/v1/embeddings", json={"input": "naïve “quotes” 日本"})
    assert raw.headers["content-type"] == "application/json" and json.loads(raw.content)["object"] == "list"


def test_a_model_has_other_names_and_any_other_is_not_found(model):
    app = create_app(model, latency_ms=0, name="mine", other_names=["20260101-1", "outputs/mine"])
    with served(app) as place, httpx.Client(base_url=place, timeout=60) as client:
        for name in ("mine", "20260101-1", "outputs/mine", "outputs/mine/"):
            answer = client.post("/v1/embeddings", json={"input": "a", "model": name})
            assert answer.status_code == 200 and answer.json()["model"] == "mine", answer.text
        assert client.get("/v1/models/outputs/mine").json()["id"] == "mine"
        refused = client.post("/v1/embeddings", json={"input": "a", "model": "text-embedding-3-small"})
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"
    assert "This server's model is mine; served_name=" in refused.json()["error"]["message"]

"""From a CSV file of one's own to a model in use: every command once, each on what the one before it has left."""

import csv
import itertools
import os
import shutil
import signal

import httpx
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tercet.app.model_card import CARD
from tercet.models.folder import load
from tests.conftest import TEXTS, tiny
from tests.end_to_end.conftest import FAST
from tests.end_to_end.forked import Forked
from tests.end_to_end.test_serve import free_port, is_ready
from tests.hub import check_card, local_hub

for package in ("faiss", "bm25s", "openai", "uvicorn", "playwright", "sentence_transformers"):
    pytest.importorskip(package)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
COUNT = 20_000


def write_table(path, names, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def search_results(place, query):
    answer = httpx.post(f"{place}/search", json={"query": query, "k": 3}, timeout=60)
    assert answer.status_code == 200, answer.text
    return [result["text"] for result in answer.json()["results"][0]]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_from_a_table_to_a_model_in_use(command, tmp_path, monkeypatch):
    from openai import OpenAI
    from playwright.sync_api import sync_playwright
    from sentence_transformers import SentenceTransformer

    pairs = [(f"What does {text}", f"{text} today") for text in TEXTS]
    write_table(tmp_path / "faq.csv", ["question", "answer"], pairs * 3)
    table = ["data=text", f"data.path={tmp_path}/faq.csv", "data.columns=[question,answer]"]
    trained = command("train", *tiny(*table, "data.held_out=8", "card.license=mit", *FAST))
    assert trained.code == 0, trained.terminal
    run = trained.output
    assert (run / "report.html").is_file() and "retrieval/" in trained.terminal

    words = ["a man", "a woman", "two dogs", "the child", "a red car", "birds", "nobody", "the teacher", "rain", "music"]
    texts = [" ".join(parts) for parts in itertools.islice(itertools.product(words, repeat=5), COUNT)]
    write_table(tmp_path / "corpus.csv", ["text"], [[text] for text in texts])
    data = ["data=table", f"data.path={tmp_path}/corpus.csv", "data.columns=[text]"]
    vectors, index = tmp_path / "corpus.parquet", tmp_path / "index"
    encoded = command("encode", f"model={run}", *data, f"output={vectors}")
    assert encoded.code == 0, encoded.terminal
    built = command("search", f"vectors={vectors}", f"output={index}", "kind=hnsw")
    assert built.code == 0 and "recall" in built.terminal, built.terminal
    asked = command("search", f"index={index}", f"query={texts[1234]}", "k=3")
    assert asked.code == 0 and texts[1234] in asked.terminal, asked.terminal

    port = free_port()
    place = f"http://127.0.0.1:{port}"
    server = Forked(
        tmp_path, "app", [f"model={run}", f"index={index}", f"port={port}", "data=table", *table[1:], f"outputs={tmp_path}"]
    )
    try:
        server.wait_for(lambda: is_ready(place), 240)
        expected = load(run).encode(TEXTS[:3])
        answer = OpenAI(base_url=f"{place}/v1", api_key="none").embeddings.create(model=run.name, input=TEXTS[:3])
        assert_close(torch.tensor([item.embedding for item in answer.data]), expected, atol=1e-4, rtol=1e-4)
        assert search_results(place, texts[1234])[0] == texts[1234]
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(place)
            page.get_by_role("searchbox").fill(texts[1234])
            page.keyboard.press("Enter")
            page.get_by_text(texts[1234], exact=False).first.wait_for(timeout=60_000)
            browser.close()
    finally:
        os.kill(server.pid, signal.SIGTERM)
        assert server.end() == 143, server.said()

    assert not check_card((run / "model" / CARD).read_text())
    with local_hub(monkeypatch) as hub:
        sent = command("push", f"model={run}", "repo=user/faq")
        assert sent.code == 0, sent.terminal
        files = hub.repositories["user/faq"].branches["main"]
    for name, content in files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    back = SentenceTransformer(str(tmp_path / "back")).encode(TEXTS[:3])
    np.testing.assert_allclose(back, expected.numpy(), atol=1e-5)

"""``python -m tercet encode`` and ``search``: from a file of texts to results."""

import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("faiss", reason="tercet[search] is not installed")
pytest.importorskip("bm25s", reason="tercet[search] is not installed")

from tercet.app.components import build
from tercet.models import load, save_model
from tercet.search import Index, encoding
from tests.conftest import TEXTS, composed, tiny
from tests.end_to_end.forked import METHOD, Forked, alive, descendants


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(build(composed(*tiny()).model).eval(), folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


def test_texts_are_encoded_indexed_and_found(command, model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "START_METHOD", "fork")
    target = tmp_path / "v.parquet"
    wrote = command("encode", f"model={model}", f"data.path={texts}", f"output={target}", "num_processes=2")
    assert wrote.code == 0 and f"12 x 32, float32. Written to {target}" in wrote.terminal, wrote.terminal
    assert pq.read_table(target)["text"].to_pylist() == TEXTS
    again = command("encode", f"model={model}", f"data.path={texts}", f"output={target}")
    assert again.code == 0 and "is complete already" in again.terminal
    built = command("search", f"vectors={target}", f"output={tmp_path / 'index'}", "kind=hnsw", "hybrid=true")
    assert built.code == 0 and "hnsw, float32, 12 x 32, cosine; recall@10 1.0000 (measured" in built.terminal, built.terminal
    asked = command("search", f"index={tmp_path / 'index'}", f"query={TEXTS[3]}", "k=2")
    assert asked.code == 0 and f"  1  1.0000  {TEXTS[3]}\n" in asked.terminal, asked.terminal
    signs = command("search", f"index={tmp_path / 'index'}", 'query=it\'s 5$, (or) [x] = "y"?', "k=50", "hybrid=true")
    assert signs.code == 0 and signs.terminal.count("\n") >= 12, signs.terminal


def test_a_file_of_queries_gives_a_file_of_results(command, model, texts, tmp_path, caplog):
    assert command("encode", f"model={model}", f"data.path={texts}", f"output={tmp_path / 'index'}/").code == 0
    queries, hits = tmp_path / "q.txt", tmp_path / "hits.jsonl"
    queries.write_text(f"{TEXTS[0]}\n\n  \n{TEXTS[5]}")
    asked = command("search", f"index={tmp_path / 'index'}", f"query={queries}", "k=3", "hybrid=true", f"output={hits}")
    assert asked.code == 0 and "2 blank lines skipped" in caplog.text, asked.terminal
    rows = [json.loads(line) for line in hits.read_text().splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 3, 1, 2, 3]
    assert [(row["query"], row["text"], row["id"]) for row in rows if row["rank"] == 1] == [
        (TEXTS[0], TEXTS[0], 0),
        (TEXTS[5], TEXTS[5], 5),
    ]


def test_vectors_alone_take_their_texts_from_the_data(command, model, texts, tmp_path):
    target, other = tmp_path / "v.npy", tmp_path / "other.txt"
    assert command("encode", f"model={model}", f"data.path={texts}", f"output={target}", "precision=int8").code == 0
    other.write_text("\n".join(reversed(TEXTS)))
    few = tmp_path / "few.txt"
    few.write_text("\n".join(TEXTS[:3]))
    for path, message in (
        (None, "data.path must be given"),
        (other, "or in another order"),
        (few, "data.path: 3 for 12 vectors"),
    ):
        more = [f"data.path={path}"] if path else []
        refused = command("search", f"vectors={target}", f"output={tmp_path / 'index'}", *more)
        assert refused.code == 1 and message in refused.terminal, refused.terminal
        assert not (tmp_path / "index").exists()
    built = command("search", f"vectors={target}", f"output={tmp_path / 'index'}", f"data.path={texts}", "precision=binary")
    assert built.code == 0 and "exact, binary, 12 x 32" in built.terminal, built.terminal
    assert Index.load(tmp_path / "index").texts([2]) == [TEXTS[2]]


def test_bad_input_is_one_message(command, model, texts, tmp_path):
    index = tmp_path / "index"
    Index.build(load(model).encode(TEXTS).numpy(), TEXTS, signature=[[1.0] * 16] * 3, model="gone").save(index)
    (tmp_path / "empty").mkdir()
    encode, search = ("encode", f"model={model}", f"data.path={texts}"), ("search", f"index={index}")
    for words, message in {
        (*encode, "output=v.csv"): "output=v.csv: a .npy or .parquet file, or a folder is needed",
        (*encode, f"output={texts}/v.npy"): "cannot be written",
        (*encode, "output=v.npy", "kind=hnsw"): "kind=hnsw is of an index",
        (*encode, f"output={tmp_path}/v.npy", "precision=int4"): "precision=int4: choose one of float32",
        (*encode, f"output={tmp_path}/v.npy", "num_processes=0"): "num_processes=0: a number from 1",
        (*encode, f"output={tmp_path}/i/", "kind=annoy"): "kind=annoy: choose one of exact",
        ("encode", f"model={tmp_path}/none", f"data.path={texts}", f"output={tmp_path}/v.npy"): "model=",
        ("search", "query=x"): "give vectors=<file> output=<folder> to build an index",
        (*search, "query="): "query is empty",
        (*search,): "query must be given",
        (*search, "query=none.txt"): "query=none.txt does not exist",
        (*search, "query=x", "k=0"): "k=0: a number of 1 or more",
        (*search, "query=x"): "model=gone",
        (*search, "query=x", f"model={model}"): "gives vectors of 32 columns, but the vectors were made by gone, with 16",
        (*search, "query=x", "output=x.doc"): "a file of results ends in",
        ("search", f"index={tmp_path}/empty", "query=x"): f"index={tmp_path}/empty is no folder of an index",
        ("search", f"vectors={tmp_path}/none.npy", "output=x"): "does not exist",
        ("search", f"vectors={texts}", "output=x"): "the name of a file that ends in .npy or .parquet",
        ("search", f"vectors={texts}"): "output must be given",
        ("search", f"vectors={texts}", f"output={index}"): "holds something already",
    }.items():
        refused = command(*words)
        assert refused.code == 1 and message in refused.terminal, (words, refused.terminal)
        assert refused.terminal.count("error:") == 1 and "Traceback" not in refused.terminal


@pytest.mark.slow
def test_an_export_and_prompts_of_its_own(command, texts, tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = build(composed(*tiny("model.prompt=['query: ','passage: ']")).model).eval()
    save_model(model, tmp_path / "model")
    assert command("export", f"model={tmp_path / 'model'}", f"output={tmp_path / 'onnx'}", "precision=float32").code == 0
    for name in ("model", "onnx"):
        done = command("encode", f"model={tmp_path / name}", f"data.path={texts}", f"output={tmp_path / name}.parquet")
        assert done.code == 0, done.terminal
    both = [torch.tensor(pq.read_table(tmp_path / f"{name}.parquet")["vector"].to_pylist()) for name in ("model", "onnx")]
    assert (both[0] - both[1]).abs().max() < 1e-4
    assert (both[0] - model.encode(TEXTS, prompt="passage: ")).abs().max() < 1e-5
    built = command("search", f"vectors={tmp_path / 'model.parquet'}", f"output={tmp_path / 'index'}")
    assert built.code == 0
    asked = command("search", f"index={tmp_path / 'index'}", "query=Rain.", f"model={tmp_path / 'onnx'}")
    assert asked.code == 0, asked.terminal
    changed = command("search", f"index={tmp_path / 'index'}", "query=Rain.", f"model={tmp_path / 'onnx'}", "model.prompt=x")
    assert changed.code == 1 and "Export it anew" in changed.terminal


def small_shards():
    """Shards of two texts, in processes that need no imports."""
    encoding.START_METHOD = "fork"
    encoding.ROWS = dict.fromkeys(encoding.ROWS, 2)


def few_shards():
    """As ``small_shards``; once two are written, each process waits to be killed."""
    small_shards()
    encode_shard = encoding._encode_shard

    def waits_after_two(encoder, items, path, column):
        if len(list(path.parent.glob("*.npy"))) >= 2:
            time.sleep(60)
        encode_shard(encoder, items, path, column)

    encoding._encode_shard = waits_after_two


@pytest.mark.skipif(METHOD != "fork", reason="processes are forked")
def test_a_command_with_processes_that_is_killed_ends_them_and_goes_on(model, texts, tmp_path):
    shards = tmp_path / ".v.parquet.shards"
    words = [f"model={model}", f"data.path={texts}", "num_processes=2"]
    killed = Forked(tmp_path, "encode", [*words, f"output={tmp_path / 'v.parquet'}"], few_shards)
    killed.wait_for(lambda: len(list(shards.glob("*.npy"))) >= 2)
    workers = descendants(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.process.join(60)
    ends = time.monotonic() + 30
    while alive(workers) and time.monotonic() < ends:
        time.sleep(0.05)
    assert len(workers) == 2 and not alive(workers)
    assert len(list(shards.glob("*.npy"))) < 6 and not (tmp_path / "v.parquet").exists()
    again = Forked(tmp_path, "encode", [*words, f"output={tmp_path / 'v.parquet'}"], small_shards)
    assert again.end() == 0 and "Going on: " in again.said(), again.said()
    whole = Forked(tmp_path, "encode", [*words, f"output={tmp_path / 'whole.parquet'}"], small_shards)
    assert whole.end() == 0, whole.said()
    assert (tmp_path / "v.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not shards.exists()

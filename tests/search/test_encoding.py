"""Encoding many items: the same bytes whatever happens, every source and model, bad input."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tercet.data import ImageFiles
from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models import ImageEncoder, random_backbone, save_model
from tercet.search import check_same_model, encode_index, encode_to, encoding, open_vectors
from tercet.search.signature import make_signature
from tests.conftest import TEXTS

FORK = multiprocessing.get_context("fork")
KINDS = (".npy", ".parquet")
TEXTS = [f"{text} {i}" for i in range(3) for text in TEXTS]  # 36: five shards of 8, the last one of 4


@pytest.fixture(autouse=True)
def _in_tests(monkeypatch):
    monkeypatch.setattr(encoding, "START_METHOD", "fork")  # importing takes seconds


@pytest.fixture
def encoder(encoder):
    return encoder.eval()


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ending", KINDS)
def test_vectors_are_those_of_encode(encoder, tmp_path, ending):
    info = encode_to(encoder, TEXTS, tmp_path / f"v{ending}", rows=8)
    found = open_vectors(tmp_path / f"v{ending}")
    assert np.abs(found[:] - encoder.encode(TEXTS).numpy()).max() < 1e-5
    assert info.count == len(TEXTS) and list(files(tmp_path)) in (
        ["v.parquet"],
        ["v.npy", "v.npy.json"],
        ["v.npy.json", "v.npy"],
    )
    if ending == ".parquet":
        assert found.texts == TEXTS and found.ids == list(range(36))


def _encode_and_die(encoder, path, event):
    """Encode in a process of its own, which is killed at the n-th touch of a file of the folder, as by a power failure."""
    seen = 0

    def audit(name, arguments):
        nonlocal seen
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(path.parent) in str(arguments[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    encode_to(encoder, TEXTS, path, rows=8, precision="int8", progress=False)
    os._exit(0)


@pytest.mark.parametrize("ending", KINDS)
def test_killed_at_any_point_and_started_again_it_gives_the_same_bytes(encoder, tmp_path, ending):
    (tmp_path / "whole").mkdir()
    encode_to(encoder, TEXTS, tmp_path / "whole" / f"v{ending}", rows=8, precision="int8")
    target, kills = tmp_path / "killed" / f"v{ending}", 0
    target.parent.mkdir()
    for event in range(4, 400, 3):  # each attempt goes on from what the one before has left
        process = FORK.Process(target=_encode_and_die, args=(encoder, target, event))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 4
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_it_goes_on_from_the_last_shard(encoder, tmp_path, monkeypatch):
    done = []

    def stop(encoder, items, path, column):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path.name)
        encode_shard(encoder, items, path, column)

    encode_shard = encoding._encode_shard
    monkeypatch.setattr(encoding, "_encode_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        encode_to(encoder, TEXTS, tmp_path / "v.npy", rows=8)
    assert not (tmp_path / "v.npy").exists()
    monkeypatch.setattr(encoding, "_encode_shard", lambda *a: (done.append(a[2].name), encode_shard(*a)))
    encode_to(encoder, TEXTS, tmp_path / "v.npy", rows=5)  # those of before count
    assert done == [f"{i:08d}.npy" for i in range(5)]


def test_processes_give_the_same_bytes(encoder, tmp_path):
    save_model(encoder, tmp_path / "model")
    paths = [tmp_path / f"{name}.parquet" for name in ("one", "two")]
    for path, count in zip(paths, (1, 2), strict=True):
        encode_to(str(tmp_path / "model"), TEXTS, path, rows=4, num_processes=count)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(InputError, match="need the name of a model"):
        encode_to(encoder, TEXTS, tmp_path / "v.npy", num_processes=2)


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_told_and_what_is_done_is_kept(encoder, tmp_path, monkeypatch):
    save_model(encoder, tmp_path / "model")
    monkeypatch.setattr(encoding, "_encode_shard", _die)
    with pytest.raises(InputError, match=r"num_processes=2 was ended from outside"):
        encode_to(str(tmp_path / "model"), TEXTS, tmp_path / "v.npy", num_processes=2)
    monkeypatch.undo()
    encode_to(encoder, TEXTS, tmp_path / "v.npy")


def test_a_repeated_call_returns_at_once_and_other_vectors_are_kept(encoder, tmp_path, monkeypatch):
    path = tmp_path / "v.parquet"
    info, before = encode_to(encoder, TEXTS, path), path.read_bytes()
    monkeypatch.setattr(encoding, "_encode_here", None)
    assert encode_to(encoder, TEXTS, path) == info
    with torch.no_grad():
        other = type(encoder)(encoder.backbone, encoder.tokenizer, pooling="max").eval()
    for model, items, precision in ((encoder, TEXTS[1:], "float32"), (encoder, TEXTS, "int8"), (other, TEXTS, "float32")):
        with pytest.raises(InputError, match="holds other vectors already"):
            encode_to(model, items, path, precision=precision)
    assert path.read_bytes() == before
    (tmp_path / "foreign.npy").write_bytes(b"mine")
    with pytest.raises(InputError, match="holds other vectors already"):
        encode_to(encoder, TEXTS, tmp_path / "foreign.npy")


def test_shards_of_other_data_are_not_mixed(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_merge", _die_softly)
    with pytest.raises(KeyboardInterrupt):
        encode_to(encoder, TEXTS, tmp_path / "v.npy")
    with pytest.raises(InputError, match="of another model, other data or another prompt"):
        encode_to(encoder, TEXTS[1:], tmp_path / "v.npy")


def _die_softly(*_):
    raise KeyboardInterrupt


def test_one_process_writes_a_file(encoder, tmp_path, monkeypatch):
    def also(*_):
        with pytest.raises(InputError, match="is being written by another process"):
            encode_to(encoder, TEXTS, tmp_path / "v.npy")
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "_merge", also)
    with pytest.raises(KeyboardInterrupt):
        encode_to(encoder, TEXTS, tmp_path / "v.npy")


def _encode_with_little_room(encoder, path, said):
    """Encode where no file may have more than 2,000 bytes: a shard fits, the result does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    torch.set_num_threads(1)
    try:
        encode_to(encoder, TEXTS, path, rows=8, progress=False)
    except InputError as error:
        said.put(str(error))


@pytest.mark.parametrize("ending", KINDS)
def test_a_disk_without_room_is_told_and_what_is_encoded_is_kept(encoder, tmp_path, ending):
    path, said = tmp_path / f"v{ending}", FORK.SimpleQueue()
    process = FORK.Process(target=_encode_with_little_room, args=(encoder, path, said))
    process.start()
    message = said.get()
    process.join(60)
    assert "cannot be written (File too large)" in message and "start the same command again" in message
    assert not path.exists() and len(list((tmp_path / f".v{ending}.shards").glob("*.npy"))) == 5
    encode_to(encoder, TEXTS, path)
    assert [name for name in files(tmp_path) if name.startswith(".")] == []


def test_bad_items_are_named(encoder, tmp_path, monkeypatch):
    for items, message in (([], "are empty"), (iter(TEXTS), "read only once"), ([b"\x89PNG"], "reads text")):
        with pytest.raises(InputError, match=message):
            encode_to(encoder, items, tmp_path / "v.npy")
    for options, message in (({"precision": "int4"}, "choose one of"), ({"side": "left"}, "document, query"),
                             ({"num_processes": 0}, "1 or more")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            encode_to(encoder, TEXTS, tmp_path / "v.npy", **options)
    with pytest.raises(InputError, match="ends in"):
        encode_to(encoder, TEXTS, tmp_path / "v.csv")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        encode_to(encoder, TEXTS, tmp_path / "file" / "v.npy")
    encoder.backbone.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"'A man is playing.*is not finite"):
        encode_to(encoder, TEXTS[:1], tmp_path / "v.npy")


def test_documents_and_queries_have_their_prompts(encoder, tmp_path):
    from tercet.models.prompts import Prompts

    encoder.prompts = Prompts.of(["query: ", "passage: "])
    for side, prompt in (("document", "passage: "), ("query", "query: ")):
        info = encode_to(encoder, TEXTS[:3], tmp_path / f"{side}.npy", side=side)
        assert info.prompt == prompt
        expected = encoder.encode(TEXTS[:3], prompt=prompt).numpy()
        assert np.abs(open_vectors(tmp_path / f"{side}.npy")[:] - expected).max() < 1e-5


def test_images_are_encoded_and_those_that_cannot_be_read_are_left_out(tmp_path, capsys):
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    torch.manual_seed(0)
    backbone = random_backbone({"model_type": "resnet", "num_channels": 1, **sizes})
    model = ImageEncoder(backbone, PixelFormat(32, 1, mean=[0.5], std=[0.25])).eval()
    for i in range(5):
        (tmp_path / "faces" / f"p{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40), dtype=np.uint8)).save(
            tmp_path / "faces" / f"p{i % 2}" / f"{i}.png"
        )
    (tmp_path / "faces" / "p0" / "bad.png").write_bytes(b"no image")
    cells = [row["image"] for row in ImageFiles(str(tmp_path / "faces")).rows()]
    info = encode_to(model, cells, tmp_path / "v.parquet", rows=2)
    table = pq.read_table(tmp_path / "v.parquet").to_pydict()
    bad = next(i for i, cell in enumerate(cells) if cell["path"].endswith("bad.png"))
    assert info.left_out == [bad] and info.count == 5 and bad not in table["id"]
    good = [cell["path"] for cell in cells if not cell["path"].endswith("bad.png")]
    assert table["text"] == good
    expected = model.encode([Path(path).read_bytes() for path in good]).numpy()
    assert np.abs(open_vectors(tmp_path / "v.parquet")[:] - expected).max() < 1e-5
    assert "1 of 6 images cannot be used" in capsys.readouterr().err


def test_an_index_is_made_once_and_knows_its_model(encoder, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    index = encode_index(encoder, TEXTS, tmp_path / "index", "hnsw", name="runs/mine", rows=8)
    assert index.texts(index.search(encoder.encode(TEXTS[3:4]).numpy(), 1)[1][0]) == [TEXTS[3]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
    monkeypatch.setattr(encoding, "_encode_here", None)
    encode_index(encoder, TEXTS, tmp_path / "index", "hnsw")
    with pytest.raises(InputError, match="holds another index already"):
        encode_index(encoder, TEXTS[1:], tmp_path / "index", "hnsw")
    check_same_model(encoder, index.settings.signature, index.model)
    torch.manual_seed(1)
    for p in encoder.backbone.parameters():
        p.data.normal_(0, 0.1)
    with pytest.raises(InputError, match=r"gives other vectors \(cosine .*were made by runs/mine"):
        check_same_model(encoder, index.settings.signature, index.model)
    with pytest.raises(InputError, match="of 32 columns, but the vectors were made by another model, with 2"):
        check_same_model(encoder, [[1.0, 2.0]] * 3, "")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_exported_model_fits_the_index_of_its_model(tmp_path, precision):
    pytest.importorskip("onnxscript")
    from tercet.models import load
    from tercet.models.export import export_model
    from tests.conftest import MINILM

    model = load(MINILM)
    export_model(model, tmp_path / "onnx", precision=precision)
    check_same_model(load(tmp_path / "onnx"), json.loads(json.dumps(make_signature(model))), "minilm")

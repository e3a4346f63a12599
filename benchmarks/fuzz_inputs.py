"""Inputs for ``benchmarks.fuzz``: good ones, and what is done to them. A kind draws a command and the files that it reads."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from tercet.app.components import build, walk
from tercet.models import Head, TextEncoder, make_tokenizer, random_backbone
from tercet.models.folder import KEY, encoder_spec, save_model

Draw = random.Random
TEXT = "a man plays the harp while dogs run in rain and she sings of ships near old sea he reads books now"
WORDS = TEXT.split()
STS_HEADER = ("task", "subset", "split", "sentence1", "sentence2", "score")
TRANSFER_HEADER = ("task", "split", "sentence1", "sentence2", "label")
PAIRS_HEADER = ("fold", "same", "identity1", "image1", "identity2", "image2")
FORMATS = ("txt", "csv", "tsv", "jsonl", "json", "parquet")
TABLES = ("csv", "tsv", "jsonl", "parquet")
# Cells, and nodes of JSON and YAML.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2.5, 1e300, -1e300, 10**30, 1 << 62, float("nan"), float("inf"), "", " ", "x", "no",
    "nan", "1e400", "007", "0x1", "9" * 5000, "A" * 200_000, "\u200b", "\u202e", "\ufeff", "é", "e\u0301", "😀", "\0",
    "\x1b[31m", "a\tb", "a\nb", "a\rb", '"', '""', "'", "=1+1", "$a_{$", "../x", "/dev/zero", "/dev/stdin", ".", "${seed}",
    "${oc.env:HOME}", "{{x}}", "<b>", "%s", "{}", [], {}, [[]], [1], ["x"], {"a": 1}, {"a": {"b": []}}, [None],
    [1, "x", None],
)  # fmt: skip
VALUES = (  # of keys, in the grammar of the command line
    "null", "true", "false", "no", "yes", "on", "''", "0", "1", "-1", "2", "3", "0.5", "1.5", "-0.5", "inf", "-inf", "nan",
    "1e300", "1e-300", "100000000000000000000", "abc", "[]", "{}", "[1]", "[0.9]", "[a,b]", "[[]]", "[null]", "{a:1}",
    "{a:{b:1}}", "é", "😀", "../x", "/dev/null", "/dev/zero", "'${seed}'", "'${nothing}'", "'${oc.env:HOME}'", "'a=b'",
    "'a,b'", "'a b'", "'[a'", "???", "'\"'", "x/y", "'$a_{$'", "auto", "max", "hub", "tercet.losses.InfoNCE",
    "{_target_:os.getcwd}", "{_target_:tercet.losses.InfoNCE}", "{_target_:nothing.at.all}",
)  # fmt: skip
NAMES = (
    "a=b.txt", "a,b.txt", "a b.txt", "a(b.txt", "a{b.txt", "a[b.txt", "'a.txt", '"a.txt', "a\\.txt", "a\n.txt", "é.txt",
    "😀.txt", "$a.txt", "${a}.txt", "#a.txt", "a:b.txt", "-a.txt", "~.txt", "%41.txt", "a;b.txt", "null", "a*.txt", "..txt",
    "a\t.txt", "\u202ea.txt", "\x1b[31m.txt", "x" * 240 + ".txt", "x" * 300 + ".txt", os.fsdecode(b"caf\xe9.txt"),
    os.fsdecode(b"\xff\xfe.txt"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A ``command`` with its ``overrides``, run in the folder that holds its files; ``changed`` is the one that was damaged."""

    command: str
    overrides: tuple[str, ...]
    changed: str | None = None


def sentence(draw: Draw) -> str:
    """A few words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 9))).capitalize() + "."


def rows_of(header: tuple[str, ...], draw: Draw, count: int) -> list[dict[str, Any]]:
    """Good rows of a table with these columns."""
    made = {
        "task": lambda i: "CR" if header == TRANSFER_HEADER else "STS-B", "subset": lambda i: "news", "score": lambda i: i % 6,
        "split": lambda i: "all" if header == TRANSFER_HEADER else "test", "label": lambda i: i % 2,
        "topic": lambda i: "ab"[i % 2],
        "number": lambda i: i, "fold": lambda i: 1 + i // 4, "same": lambda i: i % 2 == 0,
        "identity1": lambda i: f"P{i // 2 % 4}",
        "image1": lambda i: 1, "identity2": lambda i: f"P{(i // 2 + i % 2) % 4}", "image2": lambda i: 2,
        "identity": lambda i: f"P{i // 2}",
        "image_no": lambda i: 1 + i % 2,
    }  # fmt: skip
    return [{name: made.get(name, lambda i: sentence(draw))(i) for name in header} for i in range(count)]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the file's ending."""
    kind, names = path.suffix[1:], list(dict.fromkeys(name for row in rows for name in row))
    if kind == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):  # a column of several types
            columns = {name: pa.array([str(row.get(name)).encode(errors="replace").decode() for row in rows]) for name in names}
            pq.write_table(pa.table(columns), path)
        return
    if kind in ("json", "jsonl"):
        texts = [json.dumps(row) for row in rows]
        text = "\n".join(texts) + "\n" if kind == "jsonl" else f"[{', '.join(texts)}]"
    elif kind == "txt":
        text = "\n".join(str(next(iter(row.values()), "")) for row in rows) + "\n"
    else:
        mark = "," if kind == "csv" else "\t"
        quote = (lambda x: f'"{x}"' if mark in x else x) if kind == "csv" else str
        text = (
            "\n".join(mark.join(quote(str(x)) for x in cells) for cells in [names, *([*row.values()] for row in rows)]) + "\n"
        )
    path.write_bytes(text.encode(errors="surrogatepass"))


def png(draw: Draw, size: int = 16) -> bytes:
    """A small gray image."""
    out = io.BytesIO()
    Image.fromarray(np.array([[draw.randrange(256) for _ in range(size)] for _ in range(size)], np.uint8)).save(out, "png")
    return out.getvalue()


def make_materials(place: Path) -> None:
    """The good inputs: tables, images, vectors, model folders, a checkpoint, a run."""
    draw = Draw(0)
    torch.manual_seed(0)
    for name, header, count in (("pairs", ("question", "answer", "topic", "number"), 24), ("sts", STS_HEADER, 12),
                                ("transfer", TRANSFER_HEADER, 24), ("lfw", PAIRS_HEADER, 8)):  # fmt: skip
        rows = rows_of(header, draw, count)
        for kind in FORMATS:
            write_table(place / f"{name}.{kind}", rows)
    for name in "ABCD":
        (place / "images" / name).mkdir(parents=True)
        (place / "faces" / f"P{ord(name) - 65}").mkdir(parents=True)
        for number in (1, 2):
            (place / "images" / name / f"{number}.png").write_bytes(png(draw))
            (place / "faces" / f"P{ord(name) - 65}" / f"P{ord(name) - 65}_000{number}.png").write_bytes(png(draw))
    faces = [{**row, "image": png(draw)} for row in rows_of(("identity", "image_no"), draw, 8)]
    pq.write_table(pa.Table.from_pylist(faces), place / "faces.parquet")
    (place / "pairs.lfw").write_text("2 1\nP0 1 2\nP0 1 P1 1\nP2 1 2\nP2 1 P3 1\n")
    lines = [
        " ".join([word, *(f"{draw.uniform(-1, 1):.3f}" for _ in range(4))]) for word in dict.fromkeys([*WORDS, "cat", "tree"])
    ]
    (place / "vectors.txt").write_text("\n".join(lines) + "\n")
    (place / "vectors").mkdir()
    (place / "vectors" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    save_file({"embeddings": torch.randn(len(WORDS), 4)}, place / "vectors" / "embeddings.safetensors")
    (place / "synonyms.tsv").write_text("man\tfellow\nsea\tocean\twater\n")
    _make_models(place)


def _make_models(place: Path) -> None:
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 32,
    }
    words = list(dict.fromkeys([*WORDS, ".", *"abcdefghij"]))
    tokenizer = make_tokenizer([*words, "[MASK]"], lowercase=True)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    backbone = random_backbone({"model_type": "bert", "vocab_size": len(tokenizer) + 8, **sizes}, dropout=0.1)
    encoder = TextEncoder(backbone, tokenizer, "mean", Head("mlp", 6), normalize=True, max_length=16)
    save_model(encoder, place / "model")
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({KEY: encoder_spec(encoder), "state_dict": state, "global_step": 3, "epoch": 0}, place / "model.ckpt")
    gru = {
        "_target_": "tercet.models.word_backbone",
        "tokenizer": None,
        "hidden_size": 8,
        "bidirectional": True,
        "trained_dim": 4,
    }
    vocabulary = make_tokenizer(WORDS, lowercase=True)
    vocabulary.init_kwargs["counted"] = len(set(WORDS))
    save_model(TextEncoder(build(gru, tokenizer=vocabulary), vocabulary, "final", max_length=16), place / "words")
    image: dict[str, Any] = {
        "_target_": "tercet.models.ImageEncoder", "head": {"_target_": "tercet.models.Head", "kind": "linear", "dim": 4},
        "backbone": {"_target_": "tercet.models.random_backbone", "config": {
            "model_type": "resnet", "num_channels": 1, "embedding_size": 4, "hidden_sizes": [4], "depths": [1],
            "layer_type": "basic"}},
        "pixels": {"_target_": "tercet.images.PixelFormat", "size": 16, "channels": 1, "mean": [0.5], "std": [0.25]},
    }  # fmt: skip
    save_model(build(image), place / "eyes")
    for number, name in enumerate("ab", 1):
        run = place / "runs" / name
        shutil.copytree(place / "model", run / "model")
        config = {
            "seed": number,
            "name": "x",
            "command": [f"optimizer.lr={number}e-4", f"seed={number}"],
            "optimized_metric": None,
        }
        (run / "config.yaml").write_text(
            yaml.safe_dump(config | {"data": {"path": "pairs.csv", "name": "x"}, "optimizer": {"lr": 1e-4}})
        )
        (run / "metrics.json").write_text(
            json.dumps({"test/sts/stsb/spearman": 0.5, "before/sts/stsb/spearman": 0.25, "train/loss": 1.0})
        )
        np.savez_compressed(run / "examples.npz", **{"sts/stsb/spearman": np.arange(5.0)})


# Damage.


def damage_bytes(data: bytes, draw: Draw) -> bytes:
    """Cut, flip, insert, repeat, or replace."""
    at, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    inserted = (b"\0", b"\xff", b"\xe9", b"\x93", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"\r", b"\n", b"[" * 20_000, b"{" * 9,
        b"9" * 5000, b"\x80",
                b"PAR1", b"\x1f\x8b", b"\xed\xa0\x80", b";", b",", b"\t", b"---", b"&a ",
                b"!!python/object:os.system ")  # fmt: skip
    return draw.choice([
        lambda: data[:at], lambda: data[at:], lambda: b"", lambda: data[:at] + draw.choice(inserted) + data[at:],
        lambda: bytes(x ^ (1 << draw.randrange(8) if draw.random() < 0.01 else 0) for x in data),
        lambda: data[:at] + data[end:], lambda: data + data, lambda: draw.choice(inserted) * draw.randint(1, 3),
        lambda: data[:at] + draw.randbytes(draw.randint(1, 9)) + data[at + 4 :], lambda: data.replace(b",", b";"),
        lambda: data.replace(b"\n", b"\r\n"), lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: data.replace(b'"', b""),
    ])()  # fmt: skip


def damage_tree(tree: Any, draw: Draw) -> Any:
    """Replace, remove, add or repeat a node of a tree of dicts and lists."""
    places: list[tuple[Any, Any]] = [
        (node, key) for _, node in walk(tree) for key in (node if isinstance(node,
        dict) else range(len(node)) if isinstance(node, list) else ())
    ]  # fmt: skip
    if not places or draw.random() < 0.05:
        return draw.choice(ODD)
    node, key = draw.choice(places)
    action = draw.random()
    if action < 0.6:
        node[key] = draw.choice(ODD)
    elif action < 0.8:
        del node[key]
    elif action < 0.9 and isinstance(node, dict):
        node[draw.choice(["", "x", "version", "kind", "auto_map", "model_type", "weights"])] = draw.choice(ODD)
    elif isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = draw.choice([node[key] + 1, -node[key], node[key] * 1000, node[key] / 2, str(node[key])])
    else:
        node[key] = [node[key], node[key]]
    return tree


def damage_file(path: Path, draw: Draw) -> None:
    """Damage a file by what it holds, or its bytes."""
    data = path.read_bytes()
    if path.suffix in (".json", ".yaml") and draw.random() < 0.75:
        tree = damage_tree(json.loads(data) if path.suffix == ".json" else yaml.safe_load(data), draw)
        text = json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree, allow_unicode=True)
        path.write_bytes(text.encode(errors="surrogatepass"))
    elif path.suffix == ".safetensors" and draw.random() < 0.5:
        tensors = load_file(path)
        name = draw.choice(sorted(tensors))
        taken = tensors.pop(name)
        flat = taken.flatten()
        changed = draw.choice([taken.half(), flat[:1], flat, taken.long(), taken * float("nan"), torch.zeros(0), taken.bool()])
        save_file(tensors | draw.choice([{}, {name: changed.contiguous()}, {f"module.{name}": taken}, {"other": taken}]), path)
    elif path.suffix == ".npz" and draw.random() < 0.5:
        value = draw.choice(
            [np.zeros(0), np.array(["x"]), np.full(5, np.nan), np.zeros((2, 2)), np.arange(9.0), np.array([{}])]
        )
        np.savez_compressed(path, **{draw.choice(["sts/stsb/spearman", "x"]): value})
    else:
        path.write_bytes(damage_bytes(data, draw))


def damage_rows(rows: list[dict[str, Any]], draw: Draw) -> list[dict[str, Any]]:
    """Change cells, columns or the order of rows."""
    rows = [dict(row) for row in rows]
    for _ in range(draw.randint(1, 3)):
        row, name = draw.choice(rows), draw.choice(sorted(rows[0]))
        action, value = draw.random(), draw.choice(ODD)
        if action < 0.5:
            row[name] = value
        elif action < 0.65:
            rows = [{**each, name: value} for each in rows]
        elif action < 0.75:
            rows = [{key: cell for key, cell in each.items() if key != name} for each in rows]
        elif action < 0.85:
            other = str(draw.choice(["", "label", "position", "text", "x" * 300, "é", " question", *rows[0]]))
            rows = [{other if key == name else key: cell for key, cell in each.items()} for each in rows]
        elif action < 0.95:
            rows = rows[: draw.randint(0, 5)] or rows[:1]
        else:
            row.pop(name, None)
        if not rows[0]:
            break
    return rows


def read_rows(place: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a good table."""
    return [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]


# Kinds: each copies what it needs from ``place`` to ``here``, damages something and draws a command.


def table_file(draw: Draw, place: Path, here: Path, name: str, kinds: tuple[str, ...]) -> str:
    """A damaged copy of a table, named as it is."""
    file = f"{name}.{draw.choice(kinds)}"
    if draw.random() < 0.6:
        rows = damage_rows(read_rows(place, name), draw)
        if rows[0]:
            write_table(here / file, rows)
            return file
    shutil.copy(place / file, here / file)
    (here / file).write_bytes(damage_bytes((here / file).read_bytes(), draw))
    return file


def tables(draw: Draw, place: Path, here: Path) -> Case:
    """Tables and lines of text, for mining, evaluation and training."""
    file = table_file(draw, place, here, "pairs", FORMATS)
    columns = "[]" if file.endswith("txt") else draw.choice([*["[question,answer]"] * 4, "[question]", "[answer,number]", "[]"])
    label, position = draw.choice(["null", "topic", "number", "answer"]), draw.choice(["null", "number", "topic"])
    where = draw.choice(["null", "null", "null", "{topic:a}", "{number:[1,2,x]}", "{answer:1}"])
    if draw.random() < 0.5:
        given = [
            f"data.{key}={value}" for key, value in (("path", file), ("columns", columns), ("label", label), ("where", where))
        ]
        return Case("mine", (f"model={place}/model", *given, "data.held_out=4", "output=out/mined.csv"), file)
    if draw.random() < 0.5:
        kind = draw.choice(["retrieval", "alignment_uniformity"])
        given = [f"evaluation.source.{key}={value}" for key, value in (("path", file), ("columns", columns), ("where", where))]
        return Case("evaluate", (f"model={place}/model", f"evaluation={kind}", *given, "output=out/found.json"), file)
    if draw.random() < 0.5:
        kind = draw.choice(["nearest_neighbor", "clustering", "adjacent_sentences"])
        given = [
            f"data.{key}={value}"
            for key, value in (("path", file), ("columns", columns), ("label", label), ("position", position))
        ]
        options = (f"model={place}/model", "data=table", f"evaluation={kind}", "data.test.split=all")
        return Case("evaluate", (*options, *given), file)
    given = [f"data.{key}={value}" for key, value in (("path", file), ("columns", columns), ("label", label), ("where", where))]
    streaming = draw.choice(["false", "true"])
    return Case("train", (*training(place), "data=text", *given, f"data.streaming={streaming}", "data.held_out=4"), file)


def training(place: Path) -> tuple[str, ...]:
    """Overrides of a run that is small and checked only."""
    return (
        "model=bert_base", f"model.backbone.name={place}/model", "trainer.accelerator=cpu", "logger=none",
        "callback.summary=null",
        "callback.progress=null", "callback.embeddings=null", "measure_before=false", "evaluation@test=none",
        "data.batch_size=4", "data.max_length=12",
        "check=true", "output_dir=out", f"data.cache={place}/cache", "trainer.max_steps=2", "num_threads=1",
        "objective=simcse_unsup",
        "selection=none",
    )  # fmt: skip


def suites(draw: Draw, place: Path, here: Path) -> Case:
    """Tables of STS and of classification tasks."""
    name = draw.choice(["sts", "transfer"])
    file = table_file(draw, place, here, name, TABLES)
    tasks = ["evaluation.tasks=[STS-B]"] if name == "sts" else ["evaluation.tasks=[CR]", "evaluation.folds=2"]
    return Case(
        "evaluate", (f"model={place}/model", f"evaluation={name}", f"evaluation.path={file}", *tasks, "output=out/x.json"), file
    )


def images(draw: Draw, place: Path, here: Path) -> Case:
    """Images of a folder or a Parquet file, pairs of faces."""
    if draw.random() < 0.5:
        shutil.copytree(place / "images", here / "images")
        file = draw.choice(sorted((here / "images").rglob("*.png")))
        file.write_bytes(damage_bytes(_other_image(file.read_bytes(), draw), draw))
        if draw.random() < 0.3:
            file = file.rename(file.with_suffix(draw.choice([".jpg", ".gif", ".tif", ".bmp", ".pgm", ".webp", ".PNG", ".txt"])))
        kind = draw.choice(["nearest_neighbor", "clustering"])
        options = (f"model={place}/eyes", f"evaluation={kind}", "data=images", "data.path=images", "data.test.split=all")
        return Case("evaluate", options, str(file.relative_to(here)))
    faces, pairs = "faces.parquet", "pairs.txt"
    shutil.copy(place / faces, here / faces)
    shutil.copy(place / "pairs.lfw", here / pairs)
    which = draw.random()
    if which < 0.4:
        (here / pairs).write_bytes(damage_bytes((here / pairs).read_bytes(), draw))
        changed = pairs
    elif which < 0.7:
        changed = pairs = table_file(draw, place, here, "lfw", TABLES)
    else:
        changed = faces
        if draw.random() < 0.5:
            rows = damage_rows(pq.read_table(place / faces).to_pylist(), draw)
            write_table(here / faces, rows)
        else:
            damage_file(here / faces, draw)
    given = (f"evaluation.path={draw.choice([faces, faces, f'{place}/faces'])}", f"evaluation.pairs={pairs}")
    return Case("evaluate", (f"model={place}/eyes", "evaluation=verification", *given, "output=out/x.json"), changed)


def _other_image(data: bytes, draw: Draw) -> bytes:
    picture, out = Image.open(io.BytesIO(data)), io.BytesIO()
    mode, kind = draw.choice([("L", "png"), ("RGBA", "png"), ("P", "gif"), ("I;16", "tiff"), ("F", "tiff"), ("1", "png"),
        ("CMYK", "jpeg"),
                              ("RGB", "webp"), ("LA", "png")])  # fmt: skip
    converted = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
    converted.resize((draw.choice([1, 8, 16, 40]), draw.choice([1, 8, 16]))).save(out, kind)
    return out.getvalue()


def vectors(draw: Draw, place: Path, here: Path) -> Case:
    """Files of word vectors and of synonyms."""
    if draw.random() < 0.3:
        shutil.copy(place / "synonyms.tsv", here / "synonyms.tsv")
        (here / "synonyms.tsv").write_bytes(damage_bytes((here / "synonyms.tsv").read_bytes(), draw))
        given = (
            "data=text",
            f"data.path={place}/pairs.txt",
            "view=synonyms",
            "view.second.0.path=synonyms.tsv",
            "data.held_out=4",
        )
        return Case("train", (*training(place), *given), "synonyms.tsv")
    if draw.random() < 0.5:
        shutil.copy(place / "vectors.txt", here / "vectors.txt")
        (here / "vectors.txt").write_bytes(damage_bytes((here / "vectors.txt").read_bytes(), draw))
        return Case("expand", (f"model={place}/words", "vectors=vectors.txt", "output=out"), "vectors.txt")
    shutil.copytree(place / "vectors", here / "vectors")
    file = draw.choice(["vectors/vocab.txt", "vectors/embeddings.safetensors"])
    damage_file(here / file, draw)
    return Case("expand", (f"model={place}/words", "vectors=vectors", "output=out"), file)


def models(draw: Draw, place: Path, here: Path) -> Case:
    """Model folders, of which one file is damaged or gone."""
    name = draw.choice(["model", "model", "model", "words", "eyes"])
    shutil.copytree(place / name, here / "model")
    file = draw.choice(sorted(path for path in (here / "model").rglob("*") if path.is_file()))
    if draw.random() < 0.1:
        file.unlink()
    else:
        damage_file(file, draw)
    if name == "eyes":
        options = ("evaluation=clustering", "data=images", f"data.path={place}/images", "data.test.split=all")
    else:
        options = ("evaluation=sts", f"evaluation.path={place}/sts.csv", "evaluation.tasks=[STS-B]")
    changed = str(file.relative_to(here)) if file.exists() else None
    if name == "model" and draw.random() < 0.2:
        given = [o.replace(f"{place}/model", "model") for o in training(place)]
        return Case("train", (*given, "data=text", f"data.path={place}/pairs.txt", "data.held_out=4"), changed)
    return Case("evaluate", (f"model=model{draw.choice(['', '/'])}", *options), changed)


def checkpoints(draw: Draw, place: Path, here: Path) -> Case:
    """Checkpoints, for evaluation, as the start of training, and in the folder of a run that is resumed."""
    target = here / "model.ckpt"
    if draw.random() < 0.7:
        content = torch.load(place / "model.ckpt", weights_only=True)
        spec = content[KEY]
        chosen = draw.random()
        if chosen < 0.3:
            spec["config"] = json.dumps(damage_tree(json.loads(spec["config"]), draw))
        elif chosen < 0.5 and (names := [n for n in spec["tokenizer"] if n.endswith(".json")]):
            name = draw.choice(names)
            spec["tokenizer"][name] = json.dumps(damage_tree(json.loads(spec["tokenizer"][name]), draw))
        elif chosen < 0.8:
            content[KEY] = damage_tree(spec, draw)
        else:
            content = damage_tree(content, draw)
        torch.save(content, target)
    else:
        target.write_bytes(damage_bytes((place / "model.ckpt").read_bytes(), draw))
    action = draw.random()
    if action < 0.7:
        options = (f"evaluation.path={place}/sts.csv", "evaluation.tasks=[STS-B]")
        return Case("evaluate", ("model=model.ckpt", "evaluation=sts", *options), "model.ckpt")
    data = ("data=text", f"data.path={place}/pairs.txt", "data.held_out=4")
    if action < 0.85:
        return Case("train", (*training(place), *data, "init_from=model.ckpt"), "model.ckpt")
    target.unlink()
    shutil.copytree(place / "trained", here / "out")
    (here / "out" / "metrics.json").unlink()
    changed = here / "out" / draw.choice(["checkpoints/last.ckpt", "checkpoints/last.ckpt", "config.yaml"])
    damage_file(changed, draw)
    given = [o for o in training(place) if o != "check=true"]
    return Case("train", (*given, *data, "resume=true", "trainer.max_steps=3"), str(changed.relative_to(here)))


def runs(draw: Draw, place: Path, here: Path) -> Case:
    """Folders of runs, to compare and to open."""
    shutil.copytree(place / "runs", here / "runs")
    names = ["config.yaml", "config.yaml", "metrics.json", "metrics.json", "examples.npz"]
    file = here / "runs" / draw.choice("ab") / draw.choice(names)
    if draw.random() < 0.1:
        file.unlink()
    elif draw.random() < 0.1:
        file.write_text("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)))  # fmt: skip
    else:
        damage_file(file, draw)
    changed = str(file.relative_to(here)) if file.exists() else None
    if draw.random() < 0.75:
        metric = draw.choice([(), (), ("metric=test/sts/stsb/spearman",)])
        return Case("compare", (*draw.choice([("runs",), ("runs/a", "runs/b")]), *metric, "output=out"), changed)
    options = (f"evaluation.path={place}/sts.csv", "evaluation.tasks=[STS-B]")
    return Case("evaluate", (f"model={file.parent.relative_to(here)}", "evaluation=sts", *options), changed)


def names(draw: Draw, place: Path, here: Path) -> Case:
    """Files and folders with odd names, on the command line and inside of folders."""
    name, action = draw.choice(NAMES), draw.random()
    fits = len(os.fsencode(name)) < 250
    quoted = draw.choice([name, f"'{name}'", f'"{name}"'])
    if action < 0.4:
        if fits:
            shutil.copy(place / "pairs.txt", here / name)
        given = ("data=text", f"data.path={quoted}", "data.held_out=4")
        return Case("train", (*training(place), *given))
    if action < 0.6:
        if fits:
            shutil.copytree(place / "model", here / name)
        options = ("evaluation=sts", f"evaluation.path={place}/sts.csv", "evaluation.tasks=[STS-B]")
        return Case("evaluate", (f"model={quoted}", *options, f"output={draw.choice(['out', quoted])}/x.json"))
    if action < 0.8:
        if fits:
            shutil.copytree(place / "runs", here / name)
        return Case("compare", (quoted, f"output={draw.choice(['out', quoted])}"))
    folder = here / "folder"
    if draw.random() < 0.5:
        (folder / (name if fits else "x")).mkdir(parents=True)
        shutil.copy(place / "pairs.txt", folder / (name if fits else "x") / "a.txt")
        return Case("train", (*training(place), "data=text", "data.path=folder", "data.held_out=4"))
    shutil.copytree(place / "images", folder)
    (folder / "A").rename(folder / (name if fits else "x"))
    return Case(
        "evaluate", (f"model={place}/eyes", "evaluation=clustering", "data=images", "data.path=folder", "data.test.split=all")
    )


def configuration(draw: Draw, place: Path, here: Path) -> Case:
    """Values, choices and keys of the configuration."""
    command = draw.choice(["train"] * 7 + ["evaluate", "mine", "export", "expand", "compare"])
    base = {
        "train": (*training(place), "data=text", f"data.path={place}/pairs.txt", "data.held_out=4"),
        "evaluate": (f"model={place}/model", "evaluation=sts", f"evaluation.path={place}/sts.csv", "evaluation.tasks=[STS-B]"),
        "mine": (f"model={place}/model", f"data.path={place}/pairs.csv", "data.columns=[question,answer]", "output=out/x.csv"),
        "export": ("model=nothing", "output=out"), "expand": (f"model={place}/words", f"vectors={place}/vectors.txt",
        "output=out"),
        "compare": (f"{place}/runs", "output=out"),
    }[command]  # fmt: skip
    changes = [_change(draw, command) for _ in range(1 if draw.random() < 0.8 else 2)]
    return Case(command, (*base, *changes))


def _change(draw: Draw, command: str) -> str:
    known, groups = KEYS[command]
    action, key, value = draw.random(), draw.choice(known), draw.choice(VALUES)
    if action < 0.6:
        return f"{key}={value}"
    if action < 0.75 and groups:
        group = draw.choice(sorted(groups))
        return f"{group}={draw.choice([*groups[group], 'null', 'nothing'])}"
    if action < 0.85:
        return f"~{draw.choice([key, key.split('.')[0]])}"
    if action < 0.9:
        return f"+{key.rpartition('.')[0] or 'x'}.new={value}"
    if action < 0.95:
        return f"{key.rpartition('.')[0] or key}={value}"
    return draw.choice(
        [
            f"{key}",
            f"{key}=[",
            f"{key}={{",
            f"{key}='",
            f"=={key}",
            f"{key}=$(",
            f"{key}=a,b",
            "=",
            "",
            "-x",
            f"@{key}=1",
            f"{key}@x=1",
        ]
    )


KEYS: dict[str, tuple[list[str], dict[str, list[str]]]] = {}  # of each command: keys that hold a value, and choices of groups
KINDS: dict[str, tuple[Callable[[Draw, Path, Path], Case], int]] = {  # and how often each is drawn
    "configuration": (configuration, 5), "tables": (tables, 5), "suites": (suites, 2), "images": (images, 3),
    "vectors": (vectors, 2),
    "models": (models, 4), "checkpoints": (checkpoints, 3), "runs": (runs, 2), "names": (names, 2),
}  # fmt: skip


def read_keys(compose: Callable[[str, list[str]], Any], conf: Path) -> None:
    """Fill ``KEYS`` from the configuration as it is composed."""
    given = {"evaluate": ["model.path=x"], "mine": ["model.path=x", "data.path=x", "output=x"], "export": ["model.path=x",
        "output=x"],
             "expand": ["model.path=x", "vectors=x", "output=x"], "compare": ["runs=[x]"], "train": ["data=text",
             "data.path=x"]}  # fmt: skip
    for command, overrides in given.items():
        config = OmegaConf.to_container(compose(command, overrides), resolve=False)
        known = [key for key, node in walk(config) if key and not isinstance(node, dict | list) and "_target_" not in key]
        kept = [key for key in known if not key.startswith(("output_dir", "data.cache", "command"))]
        groups = (
            {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in _groups(conf)}
            if command == "train"
            else {}
        )
        KEYS[command] = kept, groups


def _groups(conf: Path) -> Iterator[Path]:
    # A sweep needs -m, and several processes take seconds to start.
    return (folder for folder in conf.iterdir() if folder.is_dir() and folder.name not in ("base", "hydra", "sweep", "trainer"))

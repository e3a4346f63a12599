"""Which models ``python -m tercet evaluate`` takes, and what can be asked of them."""

import csv
import json

import pytest
import torch

from tercet.app.components import build
from tercet.models import CachedEncoder, ConcatEncoder
from tercet.models.folder import save_model
from tests.conftest import TEXTS, composed, tiny


@pytest.fixture
def ordered(tmp_path):
    """Three documents of nine sentences, as a file; its overrides."""
    path = tmp_path / "ordered.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "book", "place"])
        writer.writerows([f"{TEXTS[i]} {book}", book, i] for book in "abc" for i in range(9))
    return ["data=table", f"data.path={path}", "data.columns=[text]", "data.label=book", "data.position=place",
            "data.test.split=all", "data.held_out=0"]  # fmt: skip


def towers(ordered, folder, seed):
    """Two small towers of words, saved."""
    torch.manual_seed(seed)
    small = ["f.backbone.hidden_size=8", "f.backbone.trained_dim=6", "f.tokenizer.minimum=1"]
    cfg = composed("model=towers", *ordered[:-2], *(f"model.{key}" for key in small))
    cfg.data.train.split = "all"
    cfg.data.train.held_out = 0
    encoder = build(cfg.model).eval()
    save_model(encoder, folder)
    return encoder


def neighbours(command, tmp_path, ordered, model, *more):
    output = tmp_path / "m.json"
    result = command(
        "evaluate",
        f"model={model}",
        "evaluation=adjacent_sentences",
        "evaluation.window=9",
        *ordered,
        f"output={output}",
        *more,
    )
    assert result.code == 0, result.terminal
    return json.loads(output.read_text()), result.terminal


def test_two_towers_and_two_of_them_joined(command, tmp_path, ordered):
    a, b = (towers(ordered, tmp_path / name, seed) for seed, name in enumerate("ab"))
    alone, said = neighbours(command, tmp_path, ordered, tmp_path / "a")
    assert "pooling: final" in said and 0 <= alone["test/adjacent_sentences/table/accuracy"] <= 1
    joined, _ = neighbours(command, tmp_path, ordered, f"[{tmp_path / 'a'},{tmp_path / 'b'}]")
    both = ConcatEncoder([CachedEncoder(a), CachedEncoder(b)])(TEXTS)
    f, g = both.chunk(2, 1)
    torch.testing.assert_close(f, torch.cat([CachedEncoder(x)(TEXTS).chunk(2, 1)[0] for x in (a, b)], 1))
    torch.testing.assert_close(g, torch.cat([CachedEncoder(x)(TEXTS).chunk(2, 1)[1] for x in (a, b)], 1))
    assert joined.keys() == alone.keys()


def test_each_half_is_normalised_on_request(command, tmp_path, ordered):
    towers(ordered, tmp_path / "a", 0)
    # With each side of each model on the unit sphere, the dot product is the cosine.
    dot, _ = neighbours(command, tmp_path, ordered, tmp_path / "a", "model.normalize=true")
    cosine, _ = neighbours(command, tmp_path, ordered, tmp_path / "a", "evaluation.similarity=cosine")
    assert dot == pytest.approx(cosine)


def test_sides_of_one_sided_models_are_joined_plainly(encoder):
    joined = ConcatEncoder([CachedEncoder(encoder), CachedEncoder(encoder)])(TEXTS)
    torch.testing.assert_close(joined, CachedEncoder(encoder)(TEXTS).repeat(1, 2))


def test_a_name_of_conf_model_is_a_model(command, tmp_path, ordered):
    made, said = neighbours(command, tmp_path, ordered, "gru", "evaluation.num_outputs=1", "data.train.split=all")
    again, _ = neighbours(command, tmp_path, ordered, "gru", "evaluation.num_outputs=1", "data.train.split=all")
    other, _ = neighbours(command, tmp_path, ordered, "gru", "evaluation.num_outputs=1", "data.train.split=all", "seed=2")
    assert "model=gru of conf/model, seed 1" in said and made == again and other.keys() == made.keys()


def test_a_name_that_is_nothing_is_an_error(command, ordered):
    result = command("evaluate", "model=no/such", "evaluation=adjacent_sentences", *ordered)
    assert result.code == 1 and "model=no/such" in result.terminal


def test_lists_with_quotes(command, tmp_path, ordered):
    save_model(build(composed(*tiny()).model).eval(), tmp_path / "a b")
    found, _ = neighbours(command, tmp_path, ordered, f"['{tmp_path / 'a b'}']", "evaluation.num_outputs=1")
    assert found

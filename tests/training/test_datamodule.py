"""Rows to batches: the same for any number of processes, tokenized once."""

from itertools import chain

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data import samplers as batches_module
from tercet.data.samplers import RandomBatchSampler, rank_slice
from tercet.data.text_transform import TextTransform, content_hash
from tercet.errors import InputError
from tercet.losses import InfoNCE
from tercet.models import load_tokenizer
from tercet.training import datamodule
from tercet.training.datamodule import DataModule, RunLength
from tests.conftest import TEXTS, TOKENIZER, Ids
from tests.laws.distributed_runs import Listed


@pytest.fixture(scope="module")
def pieces():
    return load_tokenizer(TOKENIZER)


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(batches_module, "rank", lambda: rank)
    monkeypatch.setattr(batches_module, "world_size", lambda: world)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(2, 60), size=st.integers(2, 16), world=st.integers(1, 5), seed=st.integers(0, 99), epoch=st.integers(0, 9)
)
def test_the_global_batch_does_not_depend_on_the_number_of_processes(rows, size, world, seed, epoch):
    with pytest.MonkeyPatch.context() as patch:

        def drawn(rank, world):
            as_process(patch, rank, world)
            sampler = RandomBatchSampler(Ids(torch.full((rows,), -1)), size, seed)
            sampler.set_epoch(epoch)
            return list(sampler)

        alone = drawn(0, 1)
        steps = list(zip(*(drawn(r, world) for r in range(world)), strict=True))
        assert [list(chain(*(part.rows for part in parts))) for parts in steps] == [draw.rows for draw in alone]
        assert all({part.seed for part in parts} == {draw.seed} for parts, draw in zip(steps, alone, strict=True))
        assert len(alone) == rows // size
        flat = [row for batch in alone for row in batch.rows]
        assert len(set(flat)) == len(flat)


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        sampler = RandomBatchSampler(Ids(torch.full((50,), -1)), 50, seed)
        sampler.set_epoch(epoch)
        return next(iter(sampler)).rows

    orders = [order(s, e) for s in (1, 2) for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(1, 1) == orders[1]


def test_parts_differ_by_one_row_at_most(monkeypatch):
    for world in (1, 2, 3, 7):
        sizes = []
        for rank in range(world):
            as_process(monkeypatch, rank, world)
            part = rank_slice(16)
            sizes.append(part.stop - part.start)
        assert sum(sizes) == 16
        assert max(sizes) - min(sizes) <= 1


def module(pieces, cache, source=None, max_length=16, **changes):
    given = dict(name="listed", source=source or Listed(("a", "b"), label=True),
                 transform=TextTransform(pieces, max_length, str(cache)), sampler=RandomBatchSampler,
                 batch_size=4, seed=1, workers=0, shuffle_buffer=10) | changes  # fmt: skip
    made = DataModule(**given)
    made.prepare_data()
    made.setup("fit")
    return made


@pytest.mark.parametrize(("workers", "in_shared_memory"), [(0, False), (2, False), (2, True)])
def test_a_batch_holds_what_the_rows_say(pieces, tmp_path, monkeypatch, workers, in_shared_memory):
    if in_shared_memory:
        monkeypatch.setattr(datamodule, "SHARED_BYTES", 0)
    batch = next(iter(module(pieces, tmp_path, workers=workers).train_dataloader()))
    assert {x.is_shared() for x in (batch.example_id, batch.content_hash, batch.views[0].ids)} == {in_shared_memory}
    rows = Listed(("a", "b"), label=True).rows()
    assert len(batch) == 4
    for i, uid in enumerate(batch.example_id.tolist()):
        for v, column in enumerate("ab"):
            ids = pieces(rows[column][uid], truncation=True, max_length=16)["input_ids"]
            assert batch.views[v].rows()[i].tolist() == ids
            assert int(batch.content_hash[v, i]) == content_hash(torch.tensor(ids, dtype=torch.int32).numpy().tobytes())
        assert int(batch.label[i]) == rows["label"][uid]
    assert batch.position.tolist() == batch.example_id.tolist()


def test_rows_are_tokenized_once(pieces, tmp_path, monkeypatch):
    module(pieces, tmp_path)
    monkeypatch.setattr(TextTransform, "tokenize_rows", lambda *a: pytest.fail("tokenized again"))
    assert len(module(pieces, tmp_path).dataset) == 12


def test_another_cut_or_another_tokenizer_is_another_cache(pieces, tmp_path):
    for length in (8, 16):
        module(pieces, tmp_path, max_length=length)
    module(pieces, tmp_path, source=Listed(("a", "c")))
    assert len(list(tmp_path.glob("*.arrow"))) == 3
    assert TextTransform(pieces, 8, None).fingerprint(["a"]) != TextTransform(pieces, 9, None).fingerprint(["a"])


def test_a_stream_gives_the_same_batches_to_any_number_of_processes(pieces, tmp_path, monkeypatch):
    class Stream(Listed):
        streaming = True

        def rows(self):
            return super().rows().to_iterable_dataset()

    def drawn(rank, world):
        as_process(monkeypatch, rank, world)
        loader = module(pieces, tmp_path, source=Stream(("a",))).train_dataloader()
        return [[b.views[0].rows()[i].tolist() for i in range(len(b))] for b in loader]

    alone = drawn(0, 1)
    assert [a + b for a, b in zip(drawn(0, 2), drawn(1, 2), strict=True)] == alone
    assert len(alone) == 3


def test_a_streams_epochs_differ(pieces, tmp_path):
    class Stream(Listed):
        streaming = True

        def rows(self):
            return super().rows().to_iterable_dataset()

    loader = module(pieces, tmp_path, source=Stream(("a",))).train_dataloader()
    first, second = (torch.cat([b.content_hash[0] for b in loader]).tolist() for _ in range(2))
    assert first != second


def test_a_stream_too_short_for_a_batch_is_explained(pieces, tmp_path):
    class Stream(Listed):
        streaming = True

        def rows(self):
            return super().rows().to_iterable_dataset()

    with pytest.raises(InputError, match="batch_size=99"):
        list(module(pieces, tmp_path, source=Stream(("a",)), batch_size=99).train_dataloader())


def test_a_cache_that_cannot_be_written_is_named(pieces, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache=.*cannot be written"):
        TextTransform(pieces, 8, str(tmp_path / "file" / "cache")).load(Listed(("a",)))


@pytest.mark.parametrize(("key", "value"), [("batch_size", 1), ("max_length", 2), ("workers", -1)])
def test_wrong_settings_name_their_key(pieces, tmp_path, key, value):
    with pytest.raises(InputError, match=f"{key}={value}"):
        module(pieces, tmp_path, **{key: value})


@pytest.mark.parametrize(("rows", "steps"), [(64, 20), (95, 20), (192, 60), (5_000, 1000), (None, 1000), (9, 1)])
def test_the_number_of_steps_follows_the_rows(rows, steps):
    assert RunLength(epochs=10, at_most=1000).steps(rows, batch_size=32) == steps


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"at_most": 0}, {"validations": 0}])
def test_a_run_of_no_length_is_refused(setting):
    with pytest.raises(InputError, match=f"{next(iter(setting))}=0"):
        RunLength(**setting)


def test_equal_texts_share_a_content_and_others_do_not():
    hashes = {text: content_hash(text.encode()) for text in TEXTS}
    assert len(set(hashes.values())) == len(TEXTS)
    assert content_hash(TEXTS[0].encode()) == hashes[TEXTS[0]]
    assert datasets.Features({"x": datasets.Value("int64")}).encode_example({"x": min(hashes.values())})


def test_texts_that_are_one_input_are_no_negatives(pieces):
    """Equal after tokenizing: another case, other spaces, another end that is cut off."""
    fox = "The small brown dog comes over it"
    texts = [fox, fox.upper(), fox.lower(), fox.replace(" ", "  "), f"{fox} again", f"{fox}, and again"]
    rows = TextTransform(pieces, 8).tokenize_rows({"text": texts}, ["text"])
    assert len(set(rows["content_0"])) == 1
    assert len(set(TextTransform(pieces, 10).tokenize_rows({"text": texts}, ["text"])["content_0"])) == 3
    queries, documents = torch.randn(2, len(texts), 4)
    assert InfoNCE()(queries, documents, content=rows["content_0"]) == 0
    assert InfoNCE()(queries, documents) > 0

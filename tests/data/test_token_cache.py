"""Cached tokens are those of the texts, or are made again."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tercet.data.text_transform import FOOTER, TextTransform
from tercet.types import BatchIndices
from tests.test_paths import in_child, names

WORDS = ["<unk>", *["the", "cat", "sat", "on", "a", "mat", "and", "dogs", "run"]]
TEXTS = [" ".join(WORDS[1 + (i * j) % 8] for j in range(1, 6)) for i in range(50)]


class Listed:
    """Texts of a list; ``reading`` is called when they are read."""

    columns = ("text",)

    def __init__(self, reading=lambda: None):
        self.reading = reading

    def fingerprint(self):
        return "listed"

    def rows(self):
        self.reading()
        return Dataset.from_dict({"text": TEXTS})


@pytest.fixture
def transform(tmp_path):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTransform(PreTrainedTokenizerFast(tokenizer_object=words), 8, str(tmp_path))


def ids(rows):
    return rows[BatchIndices(list(range(50)), 0)].views[0].ids


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize(("damage", "said"), [
    (lambda x: x[: len(x) // 2], "is incomplete"), (lambda x: x[:-1], "is incomplete"), (lambda x: b"", "is incomplete"),
    (lambda x: x[: -FOOTER.size], "of an earlier version"), (lambda x: x + b"x", "is incomplete"),
    (lambda x: flip(x, len(x) // 2), "is not as it was written"), (lambda x: flip(x, len(x) - 3), "is not as it was written"),
])  # fmt: skip
def test_a_damaged_file_is_found_and_made_again(transform, tmp_path, capsys, damage, said):
    want = ids(transform.load(Listed())).clone()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(ids(transform.load(Listed())), want)
    told = capsys.readouterr().err
    assert f"{file} " in told and said in told and "the texts are tokenized again" in told
    assert names(tmp_path) == [file.name] and file.read_bytes() == whole
    transform.load(Listed(lambda: pytest.fail("read again")))
    assert not capsys.readouterr().err


def test_what_a_kill_leaves_is_removed(transform, tmp_path):
    def killed():
        rows = Dataset.from_dict({"text": TEXTS})

        def write_half(*_, cache_file_name, **__):
            Path(cache_file_name).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        rows.map = write_half
        source = Listed()
        source.rows = lambda: rows
        transform.load(source)

    assert in_child(killed) == -signal.SIGKILL and names(tmp_path)
    assert len(transform.load(Listed())) == 50
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"]


def test_two_at_once_do_not_disturb_each_other(transform, tmp_path):
    """Each is reading its texts while the other one begins."""
    both, found = threading.Barrier(2, timeout=60), []
    threads = [threading.Thread(target=lambda: found.append(ids(transform.load(Listed(both.wait))))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and torch.equal(*found)
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"]

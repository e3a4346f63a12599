"""Views that say a text in other words: synonyms of a list, and predictions of a masked language model."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from tercet.errors import InputError, refuse_damaged, require
from tercet.messages import warn_once
from tercet.paths import locate
from tercet.rng import derive_seed, uniform
from tercet.types import TokenBatch
from tercet.views.text_views import RowView, TokenInfo, TokenLayout, repeat_tokens

MLM_ROWS = 32  # of one forward pass of a masked language model, whose logits are as wide as the vocabulary
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Synonyms(RowView):
    r"""Replace words by synonyms of a list, each with probability ``rate`` (as in SimCSE, arXiv:2104.08821, Table 1).

    ``path`` is a text file with a word on each line and, after a tab each, its synonyms, which may be several words. A word is
    found in the spelling of the list and with a capital, if its tokens are those of the word alone (in byte-level BPE
    punctuation belongs to the word before it). Rows that would be longer than ``info.max_length`` stay as they are.

    >>> import tempfile
    >>> from tercet.models import make_tokenizer
    >>> with tempfile.NamedTemporaryFile("w", suffix=".tsv", delete=False) as file:
    ...     _ = file.write("big\tvery large\n")
    >>> tokenizer = make_tokenizer(["a", "big", "dog", "large", "very"])
    >>> info = TokenInfo(torch.ones(len(tokenizer), dtype=torch.bool), torch.arange(len(tokenizer)) < 2, tokenizer=tokenizer)
    >>> text = TokenBatch.from_lists(tokenizer(["a big dog"])["input_ids"])
    >>> tokenizer.decode(Synonyms(file.name, rate=1.0)(text, torch.tensor([3]), info).ids)
    'a very large dog'
    """

    path: str
    rate: float = 0.3
    lines: tuple[tuple[str, ...], ...] = field(init=False, repr=False)
    tables: dict[int, dict[Tokens, list[Tokens]]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        require(0 <= self.rate <= 1, f"Synonyms with `rate`={self.rate}: a rate from 0 to 1.")
        file = locate(self.path)
        require(file.is_file(), f"Synonyms with `path`={self.path}: there is no such file.")
        with refuse_damaged(f"`path`={self.path}", advice="Save it as UTF-8."):
            lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        cells = [tuple(text for cell in line if (text := cell.strip())) for line in lines]
        for number, line in enumerate(cells, 1):
            require(len(line) != 1, f"`path`={self.path}: line {number} has no tab: a word, a tab, a synonym are needed.")
        object.__setattr__(self, "lines", tuple(line for line in cells if line))
        require(self.lines, f"`path`={self.path} has no words.")

    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        if id(info.tokenizer) not in self.tables:
            self.tables[id(info.tokenizer)] = self._table(info)
        table = self.tables[id(info.tokenizer)]
        draws = (uniform(seed[at.row], 2 * at.word + i).tolist() for i in (0, 1))
        columns = at.row.tolist(), at.word.masked_fill(~at.content, -1).tolist(), inputs.ids.tolist(), *draws
        repeats, ids = list[int](), list[int]()
        for _, row in groupby(zip(*columns, strict=True), itemgetter(0)):
            words = [list(word) for _, word in groupby(row, itemgetter(1))]
            before = [tuple(token[2] for token in word) for word in words]
            after = [self._replace(word[0], tokens, table) for word, tokens in zip(words, before, strict=True)]
            after = after if sum(map(len, after)) <= info.max_length else before
            for old, new in zip(before, after, strict=True):  # the first token of a word is repeated, the others go
                repeats += [1] * len(old) if old == new else [len(new), *[0] * (len(old) - 1)]
                ids += new
        device = inputs.ids.device
        repeated = repeat_tokens(inputs, torch.tensor(repeats, device=device), at.row)
        return replace(repeated, ids=torch.tensor(ids, device=device))

    def _replace(self, token: tuple[Any, ...], word: Tokens, table: dict[Tokens, list[Tokens]]) -> Tokens:
        *_, chance, which = token
        found = table.get(word, []) if chance < self.rate else []
        return found[int(which * len(found))] if found else word

    def _table(self, info: TokenInfo) -> dict[Tokens, list[Tokens]]:
        """The list in the tokens of a tokenizer, with and without a capital, and a space, before each word."""
        require(info.tokenizer is not None, "Synonyms: the tokenizer of the texts is not known.")
        found: dict[Tokens, list[Tokens]] = {}
        known, spellings = set[str](), list[Callable[[str], str]]([str, str.capitalize])
        for (word, *synonyms), change, space in product(self.lines, spellings, ("", " ")):
            key, *values = (self._tokens(info, space + change(text)) for text in (word, *synonyms))
            if key and not bool(info.word_start[list(key[1:])].any()):
                known.add(word)
                found[key] = list(dict.fromkeys([*found.get(key, []), *filter(None, values)]))
        require(known, f"`path`={self.path}: no word of it is a word of the tokenizer.")
        if several := len(self.lines) - len(known):
            warn_once(f"{self.path}: {several} of {len(self.lines)} words are several or unknown to the tokenizer: not found.")
        return found

    def _tokens(self, info: TokenInfo, text: str) -> Tokens:
        """The ids of a text without special tokens; none where it holds an unknown one."""
        ids = info.tokenizer(text, add_special_tokens=False)["input_ids"]
        return () if info.tokenizer.unk_token_id in ids else tuple(ids)


@dataclass(frozen=True)
class MLMReplacement(RowView):
    """Replace each token with probability ``rate`` by a prediction of a masked language model.

    In SimCSE's Table 1 (arXiv:2104.08821) BERT-base replaces 15 %. ``name`` is the folder or hub id of a model with a
    language-model head and the vocabulary of the texts. The chosen tokens of a row are masked together; each becomes one of
    its ``top_k`` most probable tokens (1: the most probable, which may be the same again). Costs a forward pass of that model
    over the view, and on a GPU the step waits for it.

    >>> MLMReplacement("google-bert/bert-base-uncased").rate
    0.15
    """

    on_device: ClassVar[bool] = True
    name: str
    rate: float = 0.15
    top_k: int = 1
    models: dict[int, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k >= 1, f"MLMReplacement with `top_k`={self.top_k}: 1 (the most probable token) or more.")

    @torch.no_grad()
    def _edit(self, inputs: TokenBatch, at: TokenLayout, seed: Tensor, info: TokenInfo) -> TokenBatch:
        if id(info.tokenizer) not in self.models:
            self.models[id(info.tokenizer)] = self._load(info)
        model, mask_id = self.models[id(info.tokenizer)].to(inputs.ids.device), info.tokenizer.mask_token_id
        chosen = at.content & (uniform(seed[at.row], at.offset) < self.rate)
        masked = replace(inputs, ids=inputs.ids.masked_fill(chosen, mask_id))
        predictions = []
        for rows in torch.arange(len(inputs)).split(MLM_ROWS):
            ids, mask, _ = masked.select(rows).pad(info.tokenizer.pad_token_id or 0)
            logits = model(input_ids=ids, attention_mask=mask).logits[ids == mask_id]
            logits[:, : len(info.special)].masked_fill_(info.special.to(logits.device), -torch.inf)
            logits[:, len(info.special) :] = -torch.inf
            predictions.append(logits.topk(self.top_k).indices)
        top = torch.cat(predictions)
        at_mask = (masked.ids == mask_id).nonzero()[:, 0]  # also those that the text had before
        drawn = (uniform(derive_seed(seed, 1)[at.row[at_mask]], at.offset[at_mask]) * self.top_k).long()
        ids = inputs.ids.index_copy(0, at_mask, top.gather(1, drawn[:, None])[:, 0])
        return replace(inputs, ids=torch.where(chosen, ids, inputs.ids))

    def _load(self, info: TokenInfo) -> Any:
        from transformers import AutoModelForMaskedLM

        from tercet.models.pretrained import load_mended, load_tokenizer  # the models import this package

        if info.mask_id is None:
            raise InputError("MLMReplacement: the tokenizer has no mask token. Use Synonyms.")
        same = load_tokenizer(self.name).get_vocab() == info.tokenizer.get_vocab()
        require(same, f"MLMReplacement with `name`={self.name}: its vocabulary is not that of the encoder.")
        model, missing = load_mended(AutoModelForMaskedLM, self.name)
        listed = f"it has no language-model head ({', '.join(missing)} are missing)"
        require(not missing, f"MLMReplacement with `name`={self.name}: {listed}.")
        return model.eval()

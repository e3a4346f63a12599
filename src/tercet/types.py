"""Core types shared by all packages.

Shapes: V views, N examples, T tokens, L longest row, H hidden, D embedding, P labels, K rows per label, W processes; images
have C channels and S x S pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

RATE_SCALE = 1 << 24  # a cutoff rate is stored as an integer in units of 1 / RATE_SCALE


@dataclass  # not frozen, like Batch: Lightning rebuilds batches field by field in true half precision
class TokenState:
    """State of T tokens besides their ids; a field that nothing has set is None."""

    keep: Tensor | None = None  # (T,), false where the token's word vector is set to zero
    position: Tensor | None = None  # (T,), in the row
    feature_cutoff: Tensor | None = None  # (T, 2): a seed, and the rate of zeroed word-vector columns in 1 / RATE_SCALE
    attend: Tensor | None = None  # (T,), false where the embedding layer's output is set to zero and no token attends to it
    embedding_cutoff: Tensor | None = None  # (T, 2), as feature_cutoff, of the embedding layer's output
    dropout_seed: Tensor | None = None  # (T,), of deterministic dropout

    def set_fields(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenState":
        """A state with ``function`` applied to every field that is set."""
        return TokenState(**{name: function(x) for name, x in self.set_fields().items()})


@dataclass(frozen=True)
class RowIndex:
    """Where the T tokens of N rows are, on the device of the tokens: made once for a pass, not in each layer.

    Tokens after the last row belong to none: their ``row`` is N and their ``position`` 0.
    """

    lengths: Tensor  # (N,), on the CPU
    longest: int  # L
    start: Tensor  # (N,), the first token of each row
    length: Tensor  # (N,)
    row: Tensor  # (T,)
    position: Tensor  # (T,), in the row

    @staticmethod
    def of(lengths: Tensor, layout: Tensor, tokens: int) -> "RowIndex":
        """The index of ``tokens`` tokens in rows of ``lengths (N,)``, from their layout, which may have more."""
        n, size = len(lengths), len(layout) // 2 - len(lengths)
        start, length, row, position = layout.split([n, n, size, size])
        return RowIndex(lengths, int(lengths.max()) if n else 0, start, length, row[:tokens], position[:tokens])

    @staticmethod
    def layout(lengths: Tensor, tokens: int) -> Tensor:
        """``start``, ``length``, ``row`` and ``position``, ``(2 N + 2 T)`` on the CPU; T is ``tokens``, some of no row."""
        n, start = len(lengths), lengths.cumsum(0) - lengths
        row = torch.repeat_interleave(torch.arange(n), lengths)
        position, more = torch.arange(len(row)) - start[row], (0, tokens - len(row))
        return torch.cat([start, lengths, F.pad(row, more, value=n), F.pad(position, more)])

    @cached_property
    def in_padded(self) -> Tensor:
        """``(T,)``, the index of each token in the flattened ``(N, L)``; N L for those of no row."""
        return self.row * self.longest + self.position

    def pad(self, flat: Tensor, fill: int = 0) -> Tensor:
        """``(T, ...)`` to ``(N, L, ...)``, padded on the right with ``fill``."""
        size = len(self.start) * self.longest
        out = flat.new_full((size + 1, *flat.shape[1:]), fill).index_copy(0, self.in_padded, flat)
        return out[:size].view(len(self.start), -1, *flat.shape[1:])

    @cached_property
    def mask(self) -> Tensor:
        """``(N, L)``, true where there is a token."""
        return torch.arange(self.longest, device=self.length.device) < self.length[:, None]


def rounded_tokens(tokens: int) -> int:
    """The number of tokens that a CUDA graph has for so many: up to an eighth more (1,800: 2,048), or a multiple of 256."""
    step = max(256, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


@dataclass
class TokenBatch:
    """N rows of token ids, concatenated without padding: ``ids (T,)`` and ``lengths (N,)``.

    ``lengths`` stays on the CPU: chunks are planned from it, and reading it from a device would block.
    """

    ids: Tensor
    lengths: Tensor
    state: TokenState = field(default_factory=TokenState)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker sends: not the index, whose tensors are parts of the layout."""
        return {name: x for name, x in vars(self).items() if name != "index"}

    @cached_property
    def layout(self) -> Tensor:
        """The parts of the index in one tensor, with as many tokens as a CUDA graph has, on the device of the ids."""
        return send([RowIndex.layout(self.lengths, rounded_tokens(len(self.ids)))], self.ids.device)[0]

    @cached_property
    def index(self) -> RowIndex:
        """Where the tokens are."""
        return RowIndex.of(self.lengths, self.layout, len(self.ids))

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Copy ids and state to ``device``."""
        return self.with_tensors(send(self.tensors(), torch.device(device)))

    def same_rows(self, ids: Tensor, state: TokenState) -> "TokenBatch":
        """Other ids and state of rows of the same lengths, which share the index."""
        rows = TokenBatch(ids, self.lengths, state)
        rows.index = self.index
        if "layout" in vars(self):
            rows.layout = self.layout
        return rows

    def tensors(self) -> list[Tensor]:
        """The ids, the layout, and the fields of the state that are set."""
        return [self.ids, self.layout, *self.state.set_fields().values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "TokenBatch":
        """The same rows with other ``tensors()``."""
        ids, layout, *state = tensors
        rows = TokenBatch(ids, self.lengths, TokenState(**dict(zip(self.state.set_fields(), state, strict=True))))
        rows.layout = layout
        return rows

    def split(self, parts: int) -> tuple["TokenBatch", ...]:
        """Split into parts of equally many rows, in the same memory."""
        if parts == 1:
            return (self,)
        lengths = self.lengths.view(parts, len(self) // parts)
        tokens = lengths.sum(1).tolist()
        ids, state = self.ids.split(tokens), {name: x.split(tokens) for name, x in self.state.set_fields().items()}
        states = (TokenState(**{name: x[i] for name, x in state.items()}) for i in range(parts))
        return tuple(map(TokenBatch, ids, lengths, states))

    def rows(self) -> tuple[Tensor, ...]:
        """Split into N tensors of ids, each ``(length,)``."""
        return torch.split(self.ids, self.lengths.tolist())

    def select(self, which: Tensor) -> "TokenBatch":
        """Select rows by index ``(n,)``, in that order."""
        lengths = self.lengths[which]
        start = (self.lengths.cumsum(0) - self.lengths)[which] - (lengths.cumsum(0) - lengths)
        tokens = torch.arange(int(lengths.sum())) + torch.repeat_interleave(start, lengths)
        (tokens,) = send([tokens], self.ids.device)
        return TokenBatch(self.ids[tokens], lengths, self.state.map(lambda x: x[tokens]))

    def pad(self, fill: int) -> tuple[Tensor, Tensor, TokenState]:
        """Pad on the right to the longest row: ``ids (N, L)``, ``mask (N, L)``, and the state as ``(N, L, ...)`` with zeros."""
        return self.index.pad(self.ids, fill), self.index.mask.long(), self.state.map(self.index.pad)

    def state_field(self, name: str) -> Tensor:
        """A field of the state; where it is not set, the value that changes nothing. ``dropout_seed`` has none."""
        value: Tensor | None = getattr(self.state, name)
        if value is not None:
            return value
        if name == "position":
            return self.index.position
        all_tokens, nothing = torch.ones_like(self.ids).bool(), self.ids.new_zeros(len(self.ids), 2)
        return {"keep": all_tokens, "attend": all_tokens, "feature_cutoff": nothing, "embedding_cutoff": nothing}[name]

    @staticmethod
    def concat(parts: "Sequence[TokenBatch]") -> "TokenBatch":
        """Concatenate the rows of all parts; ``state_field`` gives what only some parts have."""
        names = dict.fromkeys(name for part in parts for name in part.state.set_fields())
        state = {name: torch.cat([part.state_field(name) for part in parts]) for name in names}
        ids, lengths = torch.cat([part.ids for part in parts]), torch.cat([part.lengths for part in parts])
        return TokenBatch(ids, lengths, TokenState(**state))

    @staticmethod
    def from_lists(rows: Sequence[Sequence[int]]) -> "TokenBatch":
        """Make a batch of lists of token ids."""
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.long)
        return TokenBatch(ids, torch.tensor([len(row) for row in rows], dtype=torch.long))


def runs_on_cpu(device: torch.device) -> bool:
    """Whether work on ``device`` is done by the host, so that reading a result and shapes that depend on data cost nothing."""
    return device.type == "cpu"


def at_least_float32(x: Tensor) -> Tensor:
    """``x``; of half precision in float32, for sums and small differences."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to a device; to a GPU those of one type in one copy, for which the host does not wait."""
    if device.type != "cuda" or all(x.is_cuda for x in tensors):
        return [x.to(device, non_blocking=not runs_on_cpu(device)) for x in tensors]  # to a host that would read too early
    moved: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        which = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        flat = torch.cat([tensors[i].flatten() for i in which]).pin_memory().to(device, non_blocking=True)
        parts = flat.split([tensors[i].numel() for i in which])
        moved.update((i, part.view(tensors[i].shape)) for i, part in zip(which, parts, strict=True))
    return [moved[i] for i in range(len(tensors))]


@dataclass
class Images:
    """N images as 8-bit ``pixels (N, C, S, S)``; the encoder scales and normalizes them on its device."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> "Images":
        """Copy to ``device``."""
        return Images(*send(self.tensors(), torch.device(device)))

    def tensors(self) -> list[Tensor]:
        """The pixels."""
        return [self.pixels]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Images":
        """Images with other ``tensors()``."""
        return Images(*tensors)

    def split(self, parts: int) -> tuple["Images", ...]:
        """Split into parts of equally many images, in the same memory."""
        return tuple(map(Images, self.pixels.unflatten(0, (parts, len(self) // parts))))

    @staticmethod
    def concat(parts: "Sequence[Images]") -> "Images":
        """Concatenate the images of all parts."""
        return Images(torch.cat([part.pixels for part in parts]))


Inputs = TokenBatch | Images
Item = str | bytes  # what is encoded outside training: a text, or the content of an image file
EncodeFunction = Callable[[Sequence[Item]], Tensor | NDArray[Any]]  # to (N, D), in order: all that an evaluator sees of a model


class BatchIndices(NamedTuple):
    """What a batch sampler yields: row indices, and a seed for augmentation; the loader adds the optimizer's step."""

    rows: list[int]
    seed: int
    step: int = 0


@dataclass
class Batch:
    """V aligned columns (views) of N examples."""

    views: tuple[Inputs, ...]
    example_id: Tensor  # (N,), identifies the example
    label: Tensor  # (N,), -1 where there is none: such a row is only a negative
    position: Tensor  # (N,), in the document; -1 where there is none
    content_hash: Tensor  # (V, N), of each cell's token ids or image file, so that equal inputs are never used as negatives
    num_unreadable: int = 0  # rows that were drawn and could not be read
    is_prepared: bool = False  # the objective has made its views, with the seeds of dropout
    example_id_on_cpu: Tensor | None = None  # (N,), of a batch that has been copied to a device: reading that would block

    def __len__(self) -> int:
        return len(self.example_id)

    @property
    def readable_id(self) -> Tensor:
        """``example_id``, on the CPU also where the rest has been copied to a device."""
        return self.example_id if self.example_id_on_cpu is None else self.example_id_on_cpu

    @cached_property
    def inputs(self) -> Inputs:
        """The V N rows of all views, one view after the other."""
        return self.views[0] if len(self.views) == 1 else type(self.views[0]).concat(cast(Any, self.views))

    def with_inputs(self, inputs: Inputs, **changes: Any) -> "Batch":
        """The batch with other ``inputs``, of which the views are parts, and with other fields."""
        batch = replace(self, views=inputs.split(len(self.views)), **changes)
        batch.inputs = inputs
        return batch

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker sends: the inputs, and only the number of the views, which are parts of them."""
        return vars(self) | {"inputs": self.inputs, "views": len(self.views)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, views=state["inputs"].split(state["views"]))

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to ``device``, all tensors of one type at once."""
        names = ("example_id", "label", "position", "content_hash")
        moved = send([*(getattr(self, name) for name in names), *self.inputs.tensors()], torch.device(device))
        inputs, own = self.inputs.with_tensors(moved[len(names) :]), dict(zip(names, moved, strict=False))
        return self.with_inputs(inputs, example_id_on_cpu=self.readable_id, **own)

    def select_columns(self, *which: int) -> "Batch":
        """A batch with the given columns as views; a column may be given twice."""
        content_hash = torch.stack([self.content_hash[v] for v in which])
        return replace(self, views=tuple(self.views[v] for v in which), content_hash=content_hash)


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a batch, ``z (V, N, D)``, with the ids, labels, positions and content hashes of ``Batch``."""

    z: Tensor
    example_id: Tensor
    label: Tensor
    position: Tensor
    content_hash: Tensor

    def __len__(self) -> int:
        return len(self.example_id)

    def select(self, which: Tensor | slice) -> "Embeddings":
        """Select examples, in all views."""
        z, content_hash = self.z[:, which], self.content_hash[:, which]
        return Embeddings(z, self.example_id[which], self.label[which], self.position[which], content_hash)


@dataclass(frozen=True)
class LossOutput:
    """A loss summed over the anchors of one call: the mean is ``loss_sum`` / ``normalizer``, both scalars.

    A loss that is not divided has the normalizer 0 (in every process: below 1 nothing is divided).
    """

    loss_sum: Tensor
    normalizer: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)  # further means to log, each (2,): a detached sum and its divisor


class Loss(Protocol):
    """A function of anchors and keys, independent of the model and the trainer.

    Optional attributes declare what it needs: ``positives``, the kinds of positives that it can use ("example", "label",
    "position"), and ``needs_hard_negatives``, whether a setting has no effect without them.
    """

    def __call__(self, anchors: Embeddings, keys: Embeddings) -> LossOutput:
        """Sum the loss over ``anchors``, scored against ``keys``."""


class Source(Protocol):
    """Rows of texts or images.

    A cell is a text, or an image as ``{"bytes": content or None, "path": file or name}`` (the format of ``datasets``). An
    optional property ``provides`` declares what is known of the rows: "label", "position", and "all_rows" unless it streams.
    """

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns that are views, in order."""

    def rows(self) -> Any:
        """A ``datasets.Dataset`` or ``IterableDataset``: the columns, and ``label`` and ``position`` where known."""

    def fingerprint(self) -> str:
        """A hash that is equal for equal rows; it names their cache."""


class BatchDataset(Protocol):
    """The rows of a source after its transform; ``dataset[indices]`` is a batch."""

    @property
    def label(self) -> Tensor:
        """``(N,)``, -1 where there is none."""

    @property
    def position(self) -> Tensor:
        """``(N,)``, -1 where there is none."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: BatchIndices) -> Batch: ...


class Evaluator(Protocol):
    """A function of an encode function.

    Optional: ``needs``, what its source must provide ("label", "position", "pairs"); ``smaller_is_better``, the names (last
    parts) of its metrics that are better when smaller; without it the direction of its metrics is unknown;
    ``table(metrics) -> str``, the metrics as text; ``figures(encode) -> dict[str, Figure]``; ``examples(encode) -> dict[str,
    (N,)]``, by metric the values of the N examples whose mean it is.
    """

    def __call__(self, encode: EncodeFunction) -> dict[str, float]:
        """Compute metrics by name, ``<suite>/<task>/<metric>``."""

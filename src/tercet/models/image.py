"""The image encoder: backbone, pooling and head."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tercet.errors import InputError, check_choice, require
from tercet.images import PixelFormat, UnreadableImage
from tercet.models.encoder import Chunks, Encoder, PoolingMixin
from tercet.models.engine.chunking import DEFAULT_EXECUTION, Execution
from tercet.models.pooling import Head
from tercet.models.pretrained import first_line
from tercet.types import Images, Item, at_least_float32


class ImageInputs:
    """What encoders of images share: how image files become the pixels of ``pixels``, in which chunks."""

    unit = "images"
    pixels: PixelFormat

    def run(self: Any, inputs: Images, execution: Execution) -> Tensor:
        """``Images -> (N, D)``."""
        return execution.run_parts(self.embed, inputs.pixels.split(execution.chunk_rows or max(1, len(inputs))))

    def execution_for(self: Any, inputs: Images) -> Execution:
        """``execution``: a limit of tokens is for texts."""
        return self.execution  # type: ignore[no-any-return]

    def prepare(self, items: Sequence[Item]) -> Images:
        """Decode image files; raises ``InputError`` for one that cannot be decoded."""
        arrays = []
        for item in items:
            if isinstance(item, str):
                raise InputError("This model reads images, but was given text. Use a model of texts, or images.")
            try:
                arrays.append(self.pixels.read(item))
            except UnreadableImage as error:
                raise InputError(f"An image of {len(item)} bytes cannot be used: {error}.") from error
        return Images(torch.from_numpy(np.stack(arrays)))

    def encoding_chunks(self: Any, items: list[Item], tokens: int | None, batch_size: int | None) -> Chunks:
        """Chunks of ``batch_size`` images, decoded when they are needed: all pixels at once would not fit into memory."""
        chunks = torch.arange(len(items)).split(batch_size or (32 if self.device.type == "cpu" else 256))
        return list(chunks), lambda rows: self.prepare([items[i] for i in rows.tolist()])


class ImageEncoder(ImageInputs, PoolingMixin, Encoder):
    """Encoder of images by any image backbone of transformers: ``Images -> (N, D)``.

    Its feature map or tokens are pooled as the tokens of a text are. ``norm`` handles batch normalization, which makes a
    row depend on the others of its chunk: ``keep`` it, replace it by ``group`` normalization (Wu and He 2018,
    arXiv:1803.08494; for training from scratch), or keep it ``frozen`` at its running statistics (for pretrained weights).

    >>> from tercet.models import random_backbone
    >>> sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    >>> backbone = random_backbone({"model_type": "resnet", "num_channels": 1, **sizes})
    >>> encoder = ImageEncoder(backbone, PixelFormat(32, 1, mean=[0.5], std=[0.25]), norm="group")
    >>> encoder(Images(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))).shape
    torch.Size([2, 8])
    """

    kind = "image"
    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: PreTrainedModel, pixels: PixelFormat, pooling: str = "mean", head: Head | None = None,
        normalize: bool = False, norm: str = "keep", execution: Execution = DEFAULT_EXECUTION, compile: bool = False,
    ) -> None:  # fmt: skip
        check_choice("pooling", pooling, ("mean", "max", "cls", "cls_pooler"))
        check_choice("norm", norm, ("keep", "group", "frozen"))
        if norm == "group":
            _replace_batch_norms(backbone)
        hidden = _check_backbone(backbone, pixels, pooling)
        if compile:
            backbone.compile()
        super().__init__(execution)
        self._set_parts(backbone, hidden, pooling, head, normalize)
        self.pixels, self.norm = pixels, norm
        self.register_buffer("mean", torch.tensor(list(pixels.mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(pixels.std)).view(1, -1, 1, 1), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Set the mode; frozen batch normalization stays in evaluation mode."""
        super().train(mode)
        if self.norm == "frozen":
            for module in _batch_norms(self.backbone):
                module.eval()
        return self

    def embed(self, pixels: Tensor) -> Tensor:
        """``pixels (n, C, S, S)``, 8-bit, to ``(n, D)`` in one pass."""
        x = (at_least_float32(pixels.to(self.mean.dtype)) / 255 - self.mean) / self.std
        return self.pool(*_as_tokens(self.backbone(pixel_values=x.to(self.mean.dtype))))

    def mixes_rows(self) -> bool:
        """Whether an embedding depends on the other rows of its chunk while training."""
        return any(module.training for module in _batch_norms(self.backbone))

    def settings(self) -> dict[str, Any]:
        """How embeddings are made, as plain values."""
        pixels = {**vars(self.pixels), "mean": list(self.pixels.mean), "std": list(self.pixels.std)}
        return {"kind": self.kind, **super().settings(), "norm": self.norm, "pixels": pixels}


def _as_tokens(output: Any) -> tuple[Any, Tensor]:
    """A backbone's output as tokens ``(n, L, H)`` and their mask; a map ``(n, H, h, w)`` has h times w tokens."""
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    pooled = getattr(output, "pooler_output", None)
    out = SimpleNamespace(last_hidden_state=hidden, pooler_output=None if pooled is None else pooled.flatten(1))
    return out, torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)


def _check_backbone(backbone: PreTrainedModel, pixels: PixelFormat, pooling: str) -> int:
    """Check with one image that the backbone takes images of this format and has this pooling. Returns its width H.

    Weights that get no gradient (a pooler, a mask token) are frozen: DDP would wait for them.
    """
    name = type(backbone).__name__
    if pooling != "cls_pooler" and list((getattr(backbone, "pooler", None) or nn.Identity()).parameters()):
        backbone.pooler = None  # type: ignore[assignment]
    training = backbone.training
    x = torch.randn(1, pixels.channels, pixels.size, pixels.size, generator=torch.Generator().manual_seed(0))
    try:
        output = backbone.eval()(pixel_values=x)
        hidden = output.last_hidden_state
    except Exception as error:  # models raise errors of many types
        given = f"images of {pixels.channels} channels and {pixels.size} x {pixels.size} pixels ({first_line(error)})"
        advice = "Change `pixels.size`, `pixels.channels` or the `backbone`."
        raise InputError(f"`backbone`: {name} does not take {given}. {advice}") from error
    require(pooling != "cls" or hidden.ndim != 4, f"`pooling`=cls: {name} has no such token. Use `pooling`=mean.")
    tokens, _ = _as_tokens(output)
    used = tokens.pooler_output if pooling == "cls_pooler" else tokens.last_hidden_state
    require(used is not None, f"`pooling`=cls_pooler: {name} has no pooler. Use `pooling`=mean.")
    used.sum().backward()
    for p in backbone.parameters():
        p.requires_grad_(p.grad is not None and p.requires_grad)
        p.grad = None
    backbone.train(training)
    return int(used.shape[-1])


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [m for m in module.modules() if isinstance(m, kinds)]


def _replace_batch_norms(module: nn.Module) -> None:
    """Replace batch normalization by group normalization of up to 32 groups, with the same scale and shift."""
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.BatchNorm2d):
            size = child.num_features
            groups = next(g for g in (32, 16, 8, 4, 2, 1) if (size % g == 0 and size >= 4 * g) or g == 1)
            norm = nn.GroupNorm(groups, size, child.eps)
            norm.load_state_dict({"weight": child.weight, "bias": child.bias})
            module.set_submodule(name, norm)

"""Images in, vectors out."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tercet.errors import InputError
from tercet.images import PixelFormat, UnreadableImage
from tercet.models.engine.chunking import Execution
from tercet.models.pooling import Head
from tercet.models.pretrained import first_line
from tercet.models.text import Encoder
from tercet.types import Images, Inputs, Item

POOLINGS = ("mean", "max", "cls", "cls_pooler")
NORMS = ("keep", "group", "frozen")


class ImageEncoder(Encoder):
    """``Images -> (N, D)`` by any image backbone of transformers: its map or its tokens are pooled as those of a text.

    ``norm`` says what becomes of batch normalisation, which makes a row depend on the others of its chunk: ``keep`` it,
    replace it by ``group`` normalisation (Wu and He 2018, arXiv:1803.08494; for weights that are trained from scratch),
    or keep it ``frozen`` at its running statistics (for pretrained weights).
    """

    kind = "image"

    def __init__(
        self,
        backbone: PreTrainedModel,
        pixels: PixelFormat,
        pooling: str,
        head: Head,
        normalize: bool,
        norm: str,
        execution: Execution,
        compile: bool = False,
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"model.pooling={pooling}: for images choose one of {', '.join(POOLINGS)}.")
        if norm not in NORMS:
            raise InputError(f"model.norm={norm}: choose one of {', '.join(NORMS)}.")
        if norm == "group":
            _group(backbone)
        hidden = _probe(backbone, pixels, pooling)
        if compile:
            backbone.compile()
        super().__init__(backbone, hidden, pooling, head, normalize, execution)
        self.pixels = pixels
        self.norm = norm
        self.register_buffer("mean", torch.tensor(list(pixels.mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(pixels.std)).view(1, -1, 1, 1), persistent=False)
        self.train()

    mean: Tensor
    std: Tensor

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Frozen statistics stay frozen."""
        super().train(mode)
        if self.norm == "frozen":
            for module in _batch_norms(self.backbone):
                module.eval()
        return self

    def run(self, inputs: Inputs, execution: Execution) -> Tensor:
        """``Images -> (N, D)``."""
        return execution.run(self.embed, inputs)

    def embed(self, pixels: Tensor) -> Tensor:
        """``pixels (n, C, S, S)``, 8-bit, to ``(n, D)``."""
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.pool(*_tokens(self.backbone(pixel_values=x)))

    def prepare(self, items: Sequence[Item]) -> Images:
        """Decoded files; raises ``InputError`` for one that cannot be."""
        arrays = []
        for item in items:
            if isinstance(item, str):
                raise InputError("This model reads images, but was given text. Use a model of texts, or images.")
            try:
                arrays.append(self.pixels.read(item))
            except UnreadableImage as error:
                raise InputError(f"An image of {len(item)} bytes cannot be used: {error}.") from error
        return Images(torch.from_numpy(np.stack(arrays)))

    def mixes_rows(self) -> bool:
        """Whether a row's vector depends on the other rows of its chunk while training."""
        return any(module.training for module in _batch_norms(self.backbone))

    def settings(self) -> dict[str, Any]:
        """How the vectors are made, as plain values."""
        p = self.pixels
        pixels = {"size": p.size, "channels": p.channels, "mean": list(p.mean), "std": list(p.std)}
        return {**self.shared_settings(), "norm": self.norm, "pixels": pixels}


def _tokens(output: Any) -> tuple[Any, Tensor]:
    """A backbone's output as tokens ``(n, L, H)`` with their mask: a map ``(n, H, h, w)`` has h times w of them."""
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    pooled = getattr(output, "pooler_output", None)
    out = SimpleNamespace(last_hidden_state=hidden, pooler_output=None if pooled is None else pooled.flatten(1))
    return out, torch.ones(hidden.shape[:2], device=hidden.device)


def _probe(backbone: PreTrainedModel, pixels: PixelFormat, pooling: str) -> int:
    """One image through the backbone: is it one of images, of this size, with that pooling? The width H.

    Weights that get no gradient (a pooler, a mask token) are frozen: DDP would wait for them.
    """
    if pooling != "cls_pooler" and any(True for _ in (getattr(backbone, "pooler", None) or nn.Identity()).parameters()):
        backbone.pooler = None  # type: ignore[assignment]
    training = backbone.training
    x = torch.randn(1, pixels.channels, pixels.size, pixels.size, generator=torch.Generator().manual_seed(0))
    try:
        output = backbone.eval()(pixel_values=x)
        hidden = output.last_hidden_state
    except Exception as error:  # whatever the model's code says of inputs that it does not take
        raise InputError(
            f"model.backbone: {type(backbone).__name__} does not take images of {pixels.channels} channels and "
            f"{pixels.size} x {pixels.size} pixels ({first_line(error)}). Change model.pixels.size or .channels, or the "
            "backbone."
        ) from error
    if pooling == "cls" and hidden.ndim == 4:
        raise InputError(f"model.pooling=cls: {type(backbone).__name__} has no such token. Use model.pooling=mean.")
    if pooling == "cls_pooler" and getattr(output, "pooler_output", None) is None:
        raise InputError(f"model.pooling=cls_pooler: {type(backbone).__name__} has no pooler. Use model.pooling=mean.")
    tokens, _ = _tokens(output)
    used = tokens.pooler_output if pooling == "cls_pooler" else tokens.last_hidden_state
    used.sum().backward()
    for p in backbone.parameters():
        p.requires_grad_(p.grad is not None and p.requires_grad)
        p.grad = None
    backbone.train(training)
    return int(used.shape[-1])


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _group(module: nn.Module) -> None:
    """Each batch normalisation becomes group normalisation of up to 32 groups, with its scale and shift."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = next(
                g for g in (32, 16, 8, 4, 2, 1) if (child.num_features % g == 0 and child.num_features >= 4 * g) or g == 1
            )
            norm = nn.GroupNorm(groups, child.num_features, child.eps)
            norm.load_state_dict({"weight": child.weight, "bias": child.bias})
            setattr(module, name, norm)
        else:
            _group(child)

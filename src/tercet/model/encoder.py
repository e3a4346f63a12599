"""Text in, vectors out."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tercet.contract import Ragged
from tercet.error import InputError
from tercet.model.execution import Execution
from tercet.model.head import Head
from tercet.model.pooling import NEEDS_ALL_LAYERS, POOLINGS


class TextEncoder(nn.Module):
    """Backbone, pooling, head: ``Ragged -> (N, D)``; how padding comes and goes is decided in here.

    ``max_length`` cuts what ``encode`` is given, special tokens included; null is the backbone's limit.
    ``normalize`` puts z on the unit sphere. ``compile`` runs the backbone through torch.compile with dynamic shapes.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: str,
        head: Head,
        normalize: bool,
        max_length: int | None,
        execution: Execution,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise InputError(f"model.pooling={pooling}: choose one of {', '.join(POOLINGS)}.")
        words = backbone.config.vocab_size
        if len(tokenizer) > words:
            raise InputError(
                f"The tokenizer has {len(tokenizer)} pieces, the backbone's vocabulary only {words}. "
                "Use the model's own model.tokenizer.name, or a larger model.backbone.config.vocab_size."
            )
        if pooling == "cls_pooler":
            if getattr(backbone, "pooler", None) is None:
                raise InputError(
                    f"model.pooling=cls_pooler: {type(backbone).__name__} has no pooler. Use model.pooling=cls."
                )
        elif hasattr(backbone, "pooler"):
            backbone.pooler = None  # type: ignore[assignment]  # trained by nobody; DDP would wait for it
        head.build(backbone.config.hidden_size, getattr(backbone.config, "initializer_range", 0.02))
        if compile:
            backbone.compile(dynamic=True)  # in place: the names of the weights stay as they are
        # transformers hands out pretrained models in evaluation mode, and Lightning keeps what it finds: without this
        # line a pretrained encoder would train without dropout, and two dropout views would be one.
        self.backbone = backbone.train()
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.head = head
        self.normalize = normalize
        self.max_length = max_length or limit(backbone, tokenizer)
        self.execution = execution
        self.pad_id = int(tokenizer.pad_token_id or 0)

    @property
    def dim(self) -> int:
        """D."""
        hidden: int = self.backbone.config.hidden_size
        return self.head.dim or hidden if self.head.active() else hidden

    def forward(self, inputs: Ragged) -> Tensor:
        """``(N, D)``, in the order of the rows."""
        return self.execution.run(self.embed, inputs, self.pad_id)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``ids (n, L)`` and ``mask (n, L)`` to ``(n, D)``."""
        output = self.backbone(
            input_ids=ids, attention_mask=mask, output_hidden_states=self.pooling in NEEDS_ALL_LAYERS
        )
        z: Tensor = self.head(POOLINGS[self.pooling](output, mask))
        return nn.functional.normalize(z, dim=-1) if self.normalize else z

    def drops(self) -> bool:
        """Whether training draws any dropout: what makes two views of one text differ."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules())

    def tokenize(self, texts: list[str]) -> Ragged:
        """Token ids with special tokens, cut at ``max_length``."""
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)[
            "input_ids"
        ]
        return Ragged.of(ids)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def limit(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest row that the backbone takes."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or 10**9
    if backbone.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # positions start after the padding's index, which is 1
    return int(min(positions, tokenizer.model_max_length))

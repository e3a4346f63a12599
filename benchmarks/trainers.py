"""The same training by everybody: BERT with CLS pooling, InfoNCE at 0.05, AdamW, clipping at 1."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks import composed
from benchmarks.shapes import LENGTH, Task
from benchmarks.turns import Tick
from tercet.app.components import build
from tercet.training.optimizers import adamw

DROPOUT, TEMPERATURE, LR = 0.1, 0.05, 3e-5
Start = Callable[[Tick], Any]


def overrides(task: Task) -> list[str]:
    """Our run of it."""
    objective = "simcse_unsup" if len(task.columns) == 1 else "simcse_sup"
    return [
        f"objective={objective}", "model=minilm", f"model.backbone.name={task.folder}", "model.pooling=cls",
        "model.normalize=false", f"model.backbone.dropout={DROPOUT}",
        f"data.max_length={LENGTH}", f"data.batch_size={task.batch}", f"loss.temperature={TEMPERATURE}",
        f"optimizer.lr={LR}", "optimizer.weight_decay=0", "scheduler=constant", "trainer.gradient_clip_val=1.0",
        f"trainer.accelerator={task.device}", f"trainer.precision={'bf16-mixed' if task.half else '32-true'}",
    ]  # fmt: skip


def ours(task: Task, *more: str) -> Start:
    """Lightning and the callbacks of a step; ``more`` overrides, and ``~loss.`` leaves out what begins so."""
    left_out = tuple(o[1:] for o in more if o.startswith("~"))
    given = [o for o in overrides(task) if not o.startswith(left_out or "~")]
    chosen = {o.split("=", 1)[0]: o for o in [*given, *(o for o in more if not o.startswith("~"))]}
    return lambda tick: composed.fit(tick, list(chosen.values()), task.columns)


def not_fused(module: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """Our optimizer as torch makes it by itself."""
    return torch.optim.AdamW(adamw(module, **settings).param_groups, fused=False)


def encoder_alone(task: Task) -> Start:
    """Our encoder's forward and backward, ids at hand: what no training step can be faster than."""

    def start(tick: Tick) -> None:
        encoder = build(composed.configuration(overrides(task)).model).train().to(task.device)
        inputs = [encoder.prepare(texts).to(task.device) for texts in task.batches()]
        for rows in cycle(inputs):
            encoder.zero_grad(set_to_none=True)
            with _precision(task):
                loss = encoder(rows).square().sum()
            loss.backward()
            tick()

    return start


def sentence_transformers(task: Task, cached: int | None = None, flash: bool = False) -> Start:
    """Its trainer and MultipleNegativesRankingLoss; ``cached``: the cached one, with this mini-batch.

    Attention is SDPA, or ``flash``, without padding.
    """
    import datasets
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer

    attention = "flash_attention_2" if flash else "sdpa"
    transformer = Transformer(
        task.folder, max_seq_length=LENGTH, model_kwargs={"attn_implementation": attention}, unpad_inputs=flash or None
    )
    width = AutoModel.from_pretrained(task.folder).config.hidden_size
    model = SentenceTransformer(modules=[transformer, Pooling(width, pooling_mode="cls")], device=task.device)
    _same_dropout(model)
    data = datasets.Dataset.from_dict({f"c{i}": list(column) for i, column in enumerate(task.views)})
    arguments = SentenceTransformerTrainingArguments(**_arguments(task))
    plain = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
    loss = CachedMultipleNegativesRankingLoss(model, 1 / TEMPERATURE, mini_batch_size=cached) if cached else plain
    return lambda tick: SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[_Ticking(tick)]
    ).train()


def hugging_face(task: Task) -> Start:
    """Transformers' Trainer around the computation of the SimCSE repository: one forward pass over all views, padded."""
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    data = [{"texts": texts} for texts in zip(*task.views, strict=True)]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return _padded(tokenizer, [row["texts"][v] for v in range(len(task.views)) for row in rows])

    arguments = TrainingArguments(**_arguments(task), remove_unused_columns=False)
    model = _Plain(task)
    return lambda tick: Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[_Ticking(tick)]
    ).train()


def bare_loop(task: Task) -> Start:
    """Twenty lines of torch, padded to the longest of the batch."""

    def start(tick: Tick) -> None:
        tokenizer = AutoTokenizer.from_pretrained(task.folder)
        model = _Plain(task).train().to(task.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0, fused=True)
        for texts in cycle(list(task.batches())):
            optimizer.zero_grad(set_to_none=True)
            inputs = {name: x.to(task.device) for name, x in _padded(tokenizer, texts).items()}
            with _precision(task):
                loss = model(**inputs)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tick()

    return start


class _Plain(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.views = len(task.views)
        self.bert = AutoModel.from_pretrained(task.folder, add_pooling_layer=False)
        _same_dropout(self.bert)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        z = F.normalize(self.bert(**inputs).last_hidden_state[:, 0], dim=-1).unflatten(0, (self.views, -1))
        scores = z[0] @ z[1:].flatten(0, 1).T / TEMPERATURE
        return {"loss": F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))}


def _precision(task: Task) -> Any:
    return torch.autocast(task.device, torch.bfloat16, enabled=task.half)


def _same_dropout(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = DROPOUT


def _padded(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))


def _arguments(task: Task) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": task.batch, "max_steps": 10**6,
        "learning_rate": LR, "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "use_cpu": task.device == "cpu", "bf16": task.half,
        "weight_decay": 0.0,
    }  # fmt: skip


class _Ticking(TrainerCallback):
    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.tick()


FLASH = {"sentence-transformers, flash": lambda task: sentence_transformers(task, flash=True)}
ALL: dict[str, Callable[[Task], Start]] = {
    "tercet": ours,
    "tercet, encoder alone": encoder_alone,
    "sentence-transformers": sentence_transformers,
    **FLASH,
    "transformers' Trainer": hugging_face,
    "bare loop, padded": bare_loop,
    "tercet, bf16": lambda task: ours(task.in_half()),
    "sentence-transformers, bf16": lambda task: sentence_transformers(task.in_half()),
    "tercet, torch's dropout": lambda task: ours(task, "model.execution.dropout=torch"),
    "tercet, no graphs": lambda task: ours(task, "model.execution.graphs=false"),
    "tercet, compiled": lambda task: ours(task, "model.compile=true"),
    "tercet, AdamW not fused": lambda task: ours(task, "optimizer._target_=benchmarks.trainers.not_fused"),
}


def contenders(device: str) -> list[str]:
    """Who trains unless others are named. On CUDA all are in bf16; compilation is left out, it was slower."""
    if device == "cuda":
        return [name for name in list(ALL)[:6] if name not in FLASH or find_spec("flash_attn")]
    half = torch.cpu._is_avx512_bf16_supported()
    return [name for name in list(ALL)[:8] if name not in FLASH and (half or not name.endswith("bf16"))]

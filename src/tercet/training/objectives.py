"""The objectives: SimCSE, FaceNet, Quick-Thoughts, masked language modeling, and classification."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tercet.distributed import reduce_loss
from tercet.errors import InputError, require
from tercet.losses import ContextLoss, TripletLoss
from tercet.models import Encoder, Execution
from tercet.rng import derive_seed
from tercet.training.contrastive import Contrastive, Memory, ObjectiveHooks
from tercet.training.lightning_compat import FSDP2Strategy
from tercet.training.masked_lm import MaskedLM
from tercet.training.optimizers import MakeOptimizer, MakeScheduler, adamw, make_scheduler
from tercet.types import Batch, Embeddings, LossOutput, Source, TokenBatch, at_least_float32
from tercet.views import TokenInfo, Views

HELD_OUT_TOKENS = 16384  # of one forward pass


@dataclass(frozen=True)
class _Twice:
    """The first column twice, edited by ``view``."""

    view: Views
    info: TokenInfo | None

    def __call__(self, batch: Batch, step: int) -> Batch:
        two, (text, *_) = batch.select_columns(0, 0), batch.views
        if self.view.identical or self.info is None or not isinstance(text, TokenBatch):
            return two
        return replace(two, views=self.view(text, batch.example_id, step, self.info))


class SimCSEUnsup(Contrastive):
    """Unsupervised SimCSE (Gao et al. 2021, arXiv:2104.08821, section 3): a text and itself, with two dropout masks.

    ``view`` may edit the two copies of the text as well. Only the first column is used.

    >>> from tercet.training import SimCSEUnsup
    >>> SimCSEUnsup.columns, SimCSEUnsup.positives, SimCSEUnsup.makes_views
    ((1, 3), 'example', True)
    """

    makes_views: ClassVar[bool] = True

    def __init__(
        self, encoder: Encoder, loss: nn.Module | None = None, optimizer: MakeOptimizer = adamw,
        scheduler: MakeScheduler = make_scheduler, mlm: MaskedLM | None = None, memory: Memory | None = None,
        view: Views | None = None,
    ) -> None:  # fmt: skip
        super().__init__(encoder, loss, optimizer, scheduler, mlm, memory)
        self.view, info = view or Views(), encoder.token_info()
        self.views = _Twice(self.view, info)
        if self.view.identical:
            return
        require(info is not None, "These views edit texts, but the model reads images. Leave out `view`.")
        inputs, ids = encoder.prepare(["One text.", "And another one."]), torch.arange(2)
        with torch.no_grad():  # a backbone or tokenizer that the views cannot be used with raises its error now
            self.embed(self.views(Batch((inputs,), ids, ids, ids, ids[None]), 0))

    @property
    def views_on_device(self) -> bool:
        """Whether an edit runs a model."""
        return self.view.on_device


class SimCSESup(Contrastive):
    """Supervised SimCSE (Gao et al. 2021, arXiv:2104.08821, section 4): premise and entailment are positives.

    A third column, the contradiction, holds hard negatives.
    """

    columns: ClassVar[tuple[int, int]] = (2, 3)


class FaceNet(Contrastive):
    """FaceNet (Schroff et al. 2015, arXiv:1503.03832, section 3): rows of one label are close, all others far, by triplets.

    The paper's case is one column of labeled images. Two columns are positives of each other, with or without labels, and a
    third holds negatives for all rows (NLI triplets).
    """

    positives: ClassVar[str] = "label"
    default_loss: ClassVar[Callable[[], nn.Module]] = TripletLoss

    @classmethod
    def needs(cls, num_columns: int) -> frozenset[str]:
        """Several rows of one label in a batch, where there is only one column."""
        return frozenset({"same_label"} if num_columns == 1 else ())


class QuickThoughts(Contrastive):
    """Quick-Thoughts (Logeswaran and Lee 2018, arXiv:1803.02893, section 3): f of a sentence identifies g of its neighbors.

    f and g are two encoders (``DualEncoder``), two heads of one backbone (``Head`` of kind two_linear), or one encoder; the
    embedding of a sentence is [f; g]. There is one column of rows in order: ``label`` is the document, ``position`` the
    position in it.
    """

    columns: ClassVar[tuple[int, int]] = (1, 1)
    positives: ClassVar[str] = "position"
    default_loss: ClassVar[Callable[[], nn.Module]] = ContextLoss

    @classmethod
    def needs(cls, num_columns: int) -> frozenset[str]:
        """Neighboring sentences in a batch."""
        return frozenset({"adjacent"})

    def embed(self, batch: Batch) -> Embeddings:
        """``z (2, N, D)``: f and g; the same vectors twice where the encoder has one output."""
        z = at_least_float32(self.encoder(batch.inputs)).unflatten(-1, (self.encoder.num_outputs, -1))
        z = z.movedim(1, 0).expand(2, -1, -1)
        return Embeddings(z, batch.example_id, batch.label, batch.position, batch.content_hash.expand(2, -1))


class Pretraining(ObjectiveHooks, pl.LightningModule):
    """Masked language modeling alone (Devlin et al. 2019, arXiv:1810.04805), on the texts of every column.

    Pretrains a backbone, or continues that on one's own text; pooling and head are not trained. A validation measures the
    perplexity of the rows ``held_out`` as ``val/mlm/perplexity``, of the same masked tokens each time.
    """

    positives: ClassVar[str] = "none"

    def __init__(
        self, encoder: Encoder, optimizer: MakeOptimizer = adamw, scheduler: MakeScheduler = make_scheduler,
        mlm: MaskedLM | None = None, held_out: Source | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        mlm = mlm or MaskedLM(weight=1.0)
        if (head := mlm.build(encoder)) is None:
            raise InputError("`mlm.weight`=0: masked language modeling is all that this objective trains. Use `mlm.weight`=1.")
        self.optimizer, self.scheduler = optimizer, scheduler
        self.encoder = encoder
        self.mlm, self.mlm_weight = head, mlm.weight
        self.held_out, self._held_out_rows = held_out, list[TokenBatch]()
        for unused in (encoder.head, getattr(encoder.backbone, "pooler", None)):
            if unused is not None:
                unused.requires_grad_(False)  # DDP would wait for gradients that the loss does not reach

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of the chosen tokens, averaged over those of the global batch."""
        value, logged = reduce_loss(self.mlm(self.prepare(batch).inputs))
        logged["perplexity"] = logged["loss"].exp()
        self.log_training(logged, batch)
        return self.mlm_weight * value

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the perplexity of the held-out rows; ``batch`` is the dummy of ``EvaluationHooks``."""
        if self.held_out is not None:
            outputs = [self.mlm(rows.to(self.device)) for rows in self.held_out_rows()]
            total, count = (torch.stack([getattr(x, name) for x in outputs]).sum() for name in ("loss_sum", "normalizer"))
            self.log("val/mlm/perplexity", (total / count.clamp(min=1)).exp(), batch_size=1)

    def held_out_rows(self) -> list[TokenBatch]:
        """The held-out rows in batches that fit into memory, with the seeds that choose their masked tokens."""
        if self.held_out is not None and not self._held_out_rows:
            table = self.held_out.rows()
            texts = self.encoder.prepare([text for column in self.held_out.columns for text in table[column]])
            texts.state.dropout_seed = derive_seed(torch.zeros_like(texts.ids), torch.arange(len(texts.ids)))
            chunks = Execution("sorted", chunk_tokens=HELD_OUT_TOKENS).chunks(texts.lengths)
            self._held_out_rows = [texts.select(rows) for rows in chunks]
        return self._held_out_rows


class Classification(ObjectiveHooks, pl.LightningModule):
    """Traditional training, for comparison: cross entropy of a row's label, predicted by a linear layer on its embedding.

    The logits are (W z + b) / ``temperature``; embeddings of length 1 need one below 1. The items of every column have the
    label of their row; rows without a label (-1) are left out. The layer has a row for each of ``num_classes`` labels 0, 1, …;
    None: for each label of the training rows. It is saved in checkpoints only: the model is the encoder.
    """

    positives: ClassVar[str] = "none"
    classes: Tensor  # (P,), the labels, ascending

    def __init__(
        self, encoder: Encoder, optimizer: MakeOptimizer = adamw, scheduler: MakeScheduler = make_scheduler,
        num_classes: int | None = None, temperature: float = 1.0, label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        require(num_classes is None or num_classes >= 2, f"`num_classes`={num_classes}: 2 or more, or null.")
        require(temperature > 0, f"`temperature`={temperature}: a number above 0 is needed.")
        require(0 <= label_smoothing < 1, f"`label_smoothing`={label_smoothing}: 0 or more and below 1.")
        self.encoder, self.optimizer, self.scheduler = encoder, optimizer, scheduler
        self.temperature, self.label_smoothing = temperature, label_smoothing
        self.classifier: nn.Linear | None = None
        if num_classes is not None:
            self._build(torch.arange(num_classes))

    @classmethod
    def needs(cls, num_columns: int) -> frozenset[str]:
        """Labels."""
        return frozenset({"label"})

    def setup(self, stage: str) -> None:
        """Find the labels of the training rows."""
        rows: Any = getattr(getattr(self.trainer, "datamodule", None), "dataset", None)
        if self.classifier is None and stage == "fit":
            require(rows is not None, "`num_classes`=null, but the labels are not known before training. Give their number.")
            labels = rows.label.unique()
            self._build(labels[labels >= 0])

    def configure_model(self) -> None:
        """Shard the linear layer, too, where the strategy is FSDP2."""
        super().configure_model()
        if isinstance(self.trainer.strategy, FSDP2Strategy) and self.classifier is not None:
            fully_shard(self.classifier, mesh=self.trainer.strategy.device_mesh["data_parallel"])

    def _build(self, classes: Tensor) -> None:
        found = f"Classification needs two labels or more; the training rows have {len(classes)}"
        require(len(classes) > 1, f"{found}. Name the column of labels in the source's label.")
        self.register_buffer("classes", classes)
        self.classifier = nn.Linear(self.encoder.dim, len(classes))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy, averaged over the labeled items of the global batch."""
        assert self.classifier is not None
        batch = self.prepare(batch)
        z, label = self.encoder(batch.inputs), batch.label.repeat(len(batch.views))
        with torch.autocast(z.device.type, enabled=False):  # half precision loses small differences of logits
            logits = self.classifier(z.to(self.classifier.weight.dtype)).float() / self.temperature
        target = torch.where(label >= 0, torch.searchsorted(self.classes, label), -100)  # cross entropy leaves -100 out
        loss_sum = F.cross_entropy(logits, target, reduction="sum", label_smoothing=self.label_smoothing)
        count, hits = (label >= 0).sum(), (logits.argmax(1) == target).sum()
        value, logged = reduce_loss(LossOutput(loss_sum, count, {"accuracy": torch.stack([hits, count])}))
        self.log_training(logged, batch)
        return value

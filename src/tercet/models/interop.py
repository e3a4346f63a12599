"""The methods by which mteb, and the evaluators of sentence-transformers, use an encoder as if it were one of theirs."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.errors import check_choice, require
from tercet.images import encode_png
from tercet.types import Item

if TYPE_CHECKING:
    from tercet.models.encoder import Encoder

SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of (n, D) and (m, D): (n, m)
    "cosine": lambda a, b: F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT,
    "dot": lambda a, b: a @ b.mT,
    "euclidean": lambda a, b: -torch.cdist(a, b),
    "manhattan": lambda a, b: -torch.cdist(a, b, p=1),
}


class ModelCardData:
    """What evaluators of sentence-transformers report to: ``metrics`` holds all that they have measured."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, float], epoch: int = 0, step: int = 0) -> None:
        """Add the metrics of an evaluator."""
        self.metrics |= metrics


class EvaluatedModel:
    """What ``mteb.evaluate`` and the evaluators of sentence-transformers need of a model, beside ``encode``."""

    similarity_fn_name: str = "cosine"  # one of SIMILARITIES

    def encode_query(self: Any, items: Sequence[Item], **options: Any) -> Any:
        """``encode`` with the prompt for queries, where there is one."""
        return encode_with_options(self, items, prompt_type="query", **options)

    def encode_document(self: Any, items: Sequence[Item], **options: Any) -> Any:
        """``encode`` with the prompt for documents (document, passage or corpus), where there is one."""
        return encode_with_options(self, items, prompt_type="document", **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """All similarities of ``(n, D)`` and ``(m, D)``, by the model's function: ``(n, m)``; larger is nearer."""
        return SIMILARITIES[self.similarity_fn_name](_rows(embeddings1), _rows(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """The similarities of row i and row i: ``(n, D)`` and ``(n, D)`` to ``(n,)``."""
        first, second = _rows(embeddings1)[:, None], _rows(embeddings2)[:, None]
        return SIMILARITIES[self.similarity_fn_name](first, second).flatten()

    @property
    def model_card_data(self) -> ModelCardData:
        """What evaluators of sentence-transformers report to."""
        return cast(ModelCardData, self.__dict__.setdefault("_card", ModelCardData()))

    @property
    def mteb_model_meta(self: Any) -> Any:
        """The description that mteb asks for, a ``ModelMeta``."""
        return model_meta(self, f"tercet/{self.kind}")


class FunctionModel(EvaluatedModel):
    """An encode function as a model of mteb, with the prompts and the similarity of its encoder, where it has them."""

    mteb_model_meta: Any = None  # replaced by that of the function

    def __init__(self, function: Any, name: str, revision: str) -> None:
        self.function, self.mteb_model_meta = function, model_meta(function, name, revision)
        self.similarity_fn_name = self.mteb_model_meta.similarity_fn_name.value

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **options: Any) -> Any:
        """The embeddings ``(N, D)`` of the items of a data loader."""
        from tercet.evaluation.inputs import as_embeddings

        of_task = getattr(self.function, "for_task", lambda *_: self.function)
        return as_embeddings(of_task(task_metadata, prompt_type), read_items(inputs), task_metadata.name).numpy()


def model_meta(encode: Any, name: str, revision: str = "unknown") -> Any:
    """The description in mteb's form of an encoder or encode function, as far as it is known."""
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction

    encoder = getattr(encode, "encoder", encode)
    return ModelMeta.create_empty({
        "name": name, "revision": revision, "framework": ["PyTorch"], "max_tokens": getattr(encoder, "max_length", None),
        "embed_dim": getattr(encoder, "dim", None), "modalities": [getattr(encoder, "kind", "text").replace("towers", "text")],
        "similarity_fn_name": ScoringFunction(getattr(encoder, "similarity_fn_name", "cosine")),
    })  # fmt: skip


def encode_with_options(
    encoder: "Encoder", items: Any, *, batch_size: int | None = None, normalize: bool | None = None, progress: bool = False,
    tokens: int | None = None, prompt: str | None = None, prompt_name: str | None = None, prompt_type: Any = None,
    task_metadata: Any = None, show_progress_bar: bool | None = None, convert_to_numpy: bool = False,
    convert_to_tensor: bool = False, normalize_embeddings: bool = False, truncate_dim: int | None = None,
    precision: Any = None, output_value: str = "sentence_embedding", **others: Any,
) -> Any:  # fmt: skip
    """``encoder.encode`` with the keywords of sentence-transformers, or as mteb calls it: with a data loader and a task.

    The prompt is ``prompt``, else that named ``prompt_name``, else that for the task and ``prompt_type`` (query or document).
    """
    unknown = sorted(others.keys() - {"hf_split", "hf_subset", "device"})
    require(not unknown, f"`{', '.join(unknown)}`: `encode` has no such parameter.")
    check_choice("output_value", output_value, ("sentence_embedding",))
    own = encoder.own_prompts()
    if prompt is None and prompt_name is not None:
        names = own.texts if own else {}
        require(prompt_name in names, f"`prompt_name`={prompt_name}: this model's prompts are {', '.join(names) or 'none'}.")
        prompt = names[prompt_name]
    elif prompt is None and own is not None and (text := own.of_task(task_metadata, prompt_type).text) != own.text:
        prompt = text
    items = read_items(items) if task_metadata is not None else items
    z = encoder.encode(items, batch_size, normalize, bool(progress or show_progress_bar), tokens, prompt)[:, :truncate_dim]
    if normalize_embeddings:
        z = F.normalize(z, dim=-1)
    if precision not in (None, "float32"):
        from sentence_transformers.util import quantize_embeddings

        return quantize_embeddings(z.numpy(), precision)
    return z.numpy() if (convert_to_numpy and not convert_to_tensor) or task_metadata is not None else z


def read_items(loader: Iterable[dict[str, Any]]) -> list[Item]:
    """The texts, or else the images as files, in the batches of a data loader of mteb."""
    items: list[Item] = []
    for batch in loader:
        items += batch["text"] if "text" in batch else [encode_png(image.convert("RGB")) for image in batch["image"]]
    return items


def _rows(embeddings: Any) -> Tensor:
    """Vectors as a matrix of float32 or float64."""
    z = torch.as_tensor(embeddings)
    z = z if z.dtype == torch.float64 else z.float()
    return z[None] if z.ndim == 1 else z

"""The command ``evaluate``: measure any model, also one that was not trained by Tercet."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tercet.app import record
from tercet.app.components import build, check_values
from tercet.app.model_loading import open_model
from tercet.errors import InputError
from tercet.messages import print_status, silence_libraries
from tercet.models import CachedEncoder, ConcatEncoder, Encoder
from tercet.models.onnx import ONNXEncoder
from tercet.paths import check_writable
from tercet.types import EncodeFunction


def run(cfg: DictConfig, output: Path) -> float | None:
    """Print the metrics, and write them to the file ``output``."""
    silence_libraries()
    target = Path(cfg.output) if cfg.output else None
    if target is not None:
        if target.is_dir() or target.suffix != ".json":
            raise InputError(f"output={target}: the name of a .json file is needed.")
        check_writable(target.parent, "output")
    check_values(OmegaConf.create({"evaluation": OmegaConf.to_container(cfg.evaluation, resolve=True)}), cfg)
    evaluator = build(cfg.evaluation)
    names = [cfg.model.path] if isinstance(cfg.model.path, str) else list(cfg.model.path)
    members = [CachedEncoder(_open_member(cfg, str(name)), progress="evaluating") for name in names]
    encode: EncodeFunction = members[0] if len(members) == 1 else ConcatEncoder(members)
    metrics = evaluator(encode)
    values = {f"test/{name}": value for name, value in metrics.items()}
    show = getattr(evaluator, "table", None)
    print_status(show(metrics) if show else "\n".join(f"{name}  {value:.4f}" for name, value in metrics.items()))
    if target is not None:
        record.write_metrics(target.parent, values, target.name)
        draw = getattr(evaluator, "figures", None)
        drawn = draw(encode) if draw else {}  # embeddings are cached
        for name, figure in drawn.items():
            figure.savefig(target.with_name(f"{target.stem}_{name}.png"), dpi=150)
        print_status(f"Written to {target}" + "".join(f", {target.stem}_{name}.png" for name in drawn))
    return None


def _open_member(cfg: DictConfig, name: str) -> Encoder:
    """The model, with the command line's ``max_length`` and ``normalize``."""
    encoder = open_model(name, cfg.model.pooling, cfg.device, cfg.seed)
    fixed = [key for key in ("max_length", "normalize") if cfg.model[key] is not None]
    if fixed and isinstance(encoder, ONNXEncoder):
        raise InputError(f"model.{fixed[0]}={cfg.model[fixed[0]]}: an exported model cannot be changed. Export it anew.")
    texts = encoder.text_parts()
    if cfg.model.max_length:
        if not texts:
            raise InputError(f"model.max_length={cfg.model.max_length} counts tokens; this model reads images.")
        for part in texts:
            part.max_length = cfg.model.max_length
    if cfg.model.normalize is not None:
        for each in [encoder, *texts]:
            each.normalize = cfg.model.normalize
    return encoder

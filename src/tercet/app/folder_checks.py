"""What the folder of a pretrained backbone says of the encoder, compared with what a run sets, before it trains."""

from collections.abc import Iterator, Mapping
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tercet.app.hydra_compat import typed_overrides
from tercet.errors import InputError, require
from tercet.messages import warn_once
from tercet.models.folder import encoder_settings
from tercet.models.pretrained import CONFIG, TOKENIZER_CONFIG, read_json, read_module_list, resolve_source, transformer_folder

ENCODERS = ("model", "model.f", "model.g")  # keys that hold one


def check_folders(cfg: DictConfig) -> None:
    """Raise ``InputError`` where a run would leave out the layers after pooling that the backbone's folder has; say the rest.

    Each setting of an encoder that differs from the folder's is one line with its key. Nothing is said of a choice of
    ``conf/model`` on its own backbone, beyond the keys of the command: it was written for that folder. With ``init_from`` the
    weights come from elsewhere, and the differences from there are said when it is read.
    """
    nodes = {} if cfg.init_from else {key: OmegaConf.select(cfg, key) for key in ENCODERS}
    names = {key: name for key, node in nodes.items() if (name := node and OmegaConf.select(node, "backbone.name"))}
    for key, name in names.items():
        lines = dict(_differences(key, str(name), nodes[key]))
        own = lines and _chosen_backbone(key) == name
        for setting, line in lines.items():
            if not own or _is_typed(f"{key}.{setting}"):
                warn_once(f"{key}.backbone.name={name}: {line}")


def _is_typed(key: str) -> bool:
    """Whether the command sets the key, one above or one below it."""
    given = [override.lstrip("+~").split("=")[0] for override in (typed_overrides() if HydraConfig.initialized() else ())]
    return any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.") for one in given if one != "model")


def _chosen_backbone(key: str) -> Any:
    """The backbone of the choices of ``conf/model`` alone."""
    choices = HydraConfig.get().runtime.choices.items() if HydraConfig.initialized() else ()
    groups = [f"{group}={choice}" for group, choice in choices if group == "model" or group.startswith("model@")]
    return OmegaConf.select(compose("train", groups), f"{key}.backbone.name")


def _differences(key: str, name: str, node: Any) -> Iterator[tuple[str, str]]:
    """The setting, and the line about it, of each difference."""
    source = resolve_source(name, f"{key}.backbone.name")
    try:
        said = encoder_settings(source, name)
    except InputError as error:
        kinds = [module["type"] for module in (read_module_list(source) or [])[1:]]
        layers = [kind for kind in kinds if kind.rsplit(".", 1)[-1] not in ("Pooling", "Normalize")]
        reason = error.rename({"path_or_id": f"{key}.backbone.name"}).removeprefix(f"{key}.backbone.name={name}: ")
        _check_layers(key, name, node, layers, f" {reason}")
        yield "backbone", f"{reason} Its transformer and tokenizer alone are taken."
        return
    if said is None or "pooling" not in said:
        return
    head = said["head"]
    simple = [{"type": head["kind"], "dim": head.get("dim")}] if head.get("kind", "none") != "none" else []
    after = [] if head.get("train_only") else list(head.get("layers", simple))
    dense = [layer for layer in after if layer["type"] not in ("Normalize", "Truncate")]
    from_folder = node.head.kind == "folder"
    if dense and not from_folder:
        _check_layers(key, name, node, [_describe(layer) for layer in dense], "")
    last = after[after.index(dense[-1]) + 1 :] if dense else after
    normalize = said["normalize"] or (not from_folder and {"type": "Normalize"} in last)
    theirs = {"pooling": said["pooling"], "normalize": normalize, "max_length": _length(said.get("max_length"), source)}
    ours = {"pooling": node.pooling, "normalize": node.normalize, "max_length": _length(node.get("max_length"), source)}
    for setting, value in theirs.items():
        if value is not None and value != ours[setting]:
            there, here = str(value).lower(), str(ours[setting]).lower()
            yield setting, f"its folder has {setting} {there}, this run {here}. {key}.{setting}={there} is what it says."
    if (cut := [layer["dim"] for layer in last if layer["type"] == "Truncate"]) and not from_folder:
        yield "head", f"its folder has truncate_dim {cut[0]}, which this run leaves out. {key}.head.kind=folder keeps it."
    prompts = said.get("prompts", {})
    named = {which: text for which, text in prompts.get("texts", {}).items() if text}
    if named and not prompts.get("default") and not node.get("prompt"):
        yield "prompt", f"its folder has prompts, {named}, this run none. Set {key}.prompt, as {key}.prompt=[<first>,<second>]."


def _check_layers(key: str, name: str, node: Any, layers: list[str], reason: str) -> None:
    """Refuse to leave out layers, or say it where the command sets the head."""
    if not layers:
        return
    ways = f"{key}.head.kind=folder trains them too; {key}.head.kind=none leaves them out"
    ways = f"{key}.head.kind=none trains without them" if reason else ways  # they cannot be run
    what = f"{key}.backbone.name={name}: its folder has layers after pooling ({', '.join(layers)}), which"
    require(_is_typed(f"{key}.head"), f"{what} this run would leave out.{reason} {ways}.")
    warn_once(f"{what} are left out, as {key}.head.kind={node.head.kind} says.{reason}")


def _describe(layer: Mapping[str, Any]) -> str:
    names = {"linear": "Dense", "mlp": "Dense with Tanh", "Dense": f"Dense with {layer.get('activation')}"}
    return names.get(layer["type"], str(layer["type"])) + (f" to {layer['dim']}" if layer.get("dim") else "")


def _length(length: int | None, source: str) -> int | None:
    """The most tokens of a text, by the setting, the tokenizer and the positions; None where nothing says."""
    folder = transformer_folder(source)
    files = [(TOKENIZER_CONFIG, "model_max_length"), (CONFIG, "max_position_embeddings")]
    own, positions = ((read_json(source, f"{folder}/{file}".lstrip("/")) or {}).get(name) for file, name in files)
    limits = [limit for limit in (length or own, positions) if isinstance(limit, int) and limit > 0]
    return min(limits, default=None) if limits and min(limits) < 10**9 else None

"""Errors in the user's words: what was got, what is accepted, which key to change."""

import difflib
import re
from pathlib import Path

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from tercet.errors import InputError


def explain(error: BaseException, conf: str, command: str) -> str:
    """One message for any exception."""
    for cause in _chain(error):
        if isinstance(cause, InputError):
            return str(cause)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read ({' '.join(str(error).split())}). Quote it: 'key=\"value\"'."
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, ConfigCompositionException):
        return _mistyped(error, conf, command)
    if isinstance(error, InstantiationException):
        return _instantiation(error)
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key} must be given: {error.full_key}=..."
    if isinstance(error, InterpolationKeyError) and (found := re.search(r"'model\.(tokenizer|pixels)'", str(error))):
        text = found[1] == "tokenizer"
        kinds = ("text", "images", "minilm", "images") if text else ("images", "text", "resnet_small", "text")
        return f"data holds {kinds[0]}, but model reads {kinds[1]}. Use model={kinds[2]}, or data={kinds[3]}."
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. output_dir names where a run writes, data.path what it reads."
    text = " ".join(str(error).split()) or "no further word"
    return f"{type(error).__name__}: {text} (TERCET_DEBUG=1 shows where)"


def _chain(error: BaseException | None) -> list[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def _missing_choice(error: MissingConfigException) -> str:
    name = str(error.missing_cfg_file or "")
    options = [str(option) for option in error.options or []]
    group, _, choice = name.rpartition("/")
    near = difflib.get_close_matches(choice, options, 1)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    return f"{group}={choice}: no such choice.{hint} There are: {', '.join(options)}."


def _mistyped(error: ConfigCompositionException, conf: str, command: str) -> str:
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if command != "train" and "In 'data/text'" in text:  # it chooses an objective, too
        return f"data=text is for training. With `{command}` use data=files, and the same data.path and data.columns."
    wrong = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if not wrong:
        return text
    key = wrong[1].lstrip("+~").split("@")[0]
    known = sorted(known_keys(conf, command))
    if key in known:
        return text
    near = difflib.get_close_matches(key, known, 1, 0.5) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{key}: there is no such key.{hint} `--cfg job` prints all keys with their values."


def known_keys(conf: str, command: str) -> set[str]:
    """Every key that any file of the configuration defines, and every group."""
    found: set[str] = set()
    for path in Path(conf).rglob("*.yaml"):
        group = path.parent.relative_to(conf).as_posix()
        prefix = "" if group in (".", "experiment", "sweep") else f"{group}."
        if group == "." and path.stem != command:
            continue
        found |= {prefix.rstrip(".")} - {""}
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        found |= _flat(content, prefix)
    return found


def _flat(node: object, prefix: str) -> set[str]:
    if not isinstance(node, dict):
        return set()
    names = {str(k) for k in node if str(k) not in ("defaults", "hydra") and not str(k).startswith("_")}
    inner = (_flat(node[name], f"{prefix}{name}.") for name in names)
    return {f"{prefix}{name}" for name in names}.union(*inner)


def _instantiation(error: InstantiationException) -> str:
    cause = error.__cause__
    where = re.search(r"full_key: (\S+)", str(error))
    place = f"{where[1]}: " if where else ""
    return place + " ".join(str(cause or error).split())

"""Errors in the user's words: what was got, what is accepted, which configuration key to change."""

import difflib
import re
import traceback
from collections.abc import Iterator
from types import FrameType

from hydra import errors
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from tercet.app import components, hydra_compat
from tercet.errors import InputError

NOT_SETTABLE = re.compile(r"(^|\.)(_|\d|defaults\b|hydra\b)")  # keys, or their parts: _target_, an index of a list


def explain(error: BaseException, command: str) -> str:
    """One message for any exception; the parameters that an ``InputError`` names become full configuration keys."""
    chain = _chain(error)
    for i, cause in enumerate(chain):
        if isinstance(cause, InputError):
            return cause.rename(parameter_keys(cause, chain[: i + 1]))
    text = " ".join(str(error).split())
    if isinstance(error, errors.OverrideParseException):
        return f"{error.override}: cannot be read ({text}). Quote it: 'key=\"value\"'."
    if isinstance(error, errors.MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, errors.ConfigCompositionException):
        return _mistyped(error, command)
    if isinstance(error, errors.InstantiationException):
        where = re.search(r"full_key: (\S+)", str(error))
        place = f"{hydra_compat.source_key(components.raw_config(), where[1])}: " if where else ""
        return place + " ".join(str(error.__cause__ or error).split())
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key} must be given: {error.full_key}=..."
    if isinstance(error, InterpolationKeyError) and (found := re.search(r"'model\.(tokenizer|pixels)'", str(error))):
        if found[1] == "tokenizer":
            return "data holds text, but model reads images. Use model=minilm, or data=images."
        return "data holds images, but model reads text. Use model=resnet_small, or data=text."
    if isinstance(error, (errors.HydraException, OmegaConfBaseException)):
        return text
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. output_dir is the folder that a run writes, data.path what it reads."
    return f"{type(error).__name__}: {text or 'no message'} (TERCET_DEBUG=1 shows where)"


def _chain(error: BaseException | None) -> list[BaseException]:
    """The exception, its cause, the cause of that, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def parameter_keys(error: InputError, chain: list[BaseException]) -> dict[str, str]:
    """The configuration key of each parameter that the error names: of the component whose method or constructor raised it.

    ``chain`` are the exceptions from the outermost one to ``error``; their tracebacks are searched from the innermost frame.
    """
    frames = [frame for cause in reversed(chain) for frame, _ in reversed(list(traceback.walk_tb(cause.__traceback__)))]
    owners = list(dict.fromkeys(_owners(frames)))
    keys = {}
    for parameter in error.parameters():
        if key := next(filter(None, (components.settable_key(owner, parameter) for owner in owners)), None):
            keys[parameter] = key
    return keys


def _owners(frames: list[FrameType]) -> Iterator[str]:
    for frame in frames:
        if frame.f_code is components.create.__code__:  # a constructor or function: there is no object yet
            yield frame.f_locals["key"]
        elif key := components.component_key(frame.f_locals.get("self")):
            yield key


def _missing_choice(error: errors.MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    if group == "data" and choice in ("files", "any", "default"):
        return f"data={choice}: no such choice any more. data=table reads files of texts, data=text trains on them."
    options = list(map(str, error.options or []))
    near = difflib.get_close_matches(choice, options, 1)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    return f"{group}={choice}: no such choice.{hint} There are: {', '.join(options)}."


def _mistyped(error: errors.ConfigCompositionException, command: str) -> str:
    text, cause = " ".join(f"{error} {error.__cause__ or ''}".split()), error.__cause__
    if command != "train" and "In 'data/text'" in text:  # it chooses an objective, too
        return f"data=text is for training. With `{command}` use data=table, and the same data.path and data.columns."
    composed = hydra_compat.failed_config(cause)
    known = sorted(key for key, _ in components.walk(composed) if key and not NOT_SETTABLE.search(key))
    key = getattr(cause, "full_key", None)
    if not known or not key or key in known:
        return text
    inside = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = (inside if "." not in key else []) or difflib.get_close_matches(key, known, 1, 0.5) or inside
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{key}: there is no such key.{hint} `--cfg job` prints all keys with their values."

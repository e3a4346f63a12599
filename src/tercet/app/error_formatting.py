"""Errors in the user's words: what was got, what is accepted, which configuration key to change."""

import difflib
import re
import traceback
from types import FrameType

from hydra import errors
from omegaconf import errors as config_errors

from tercet.app import components, hydra_compat
from tercet.errors import InputError

NOT_SETTABLE = re.compile(r"(^|\.)(_|\d|defaults\b|hydra\b)")  # keys, or their parts: _target_, an index of a list

ELSEWHERE = {  # what other programs call a key
    "learning_rate": "optimizer.lr", "warmup_ratio": "scheduler.warmup", "tau": "loss.temperature",
    "steps": "trainer.max_steps",
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "trainer.max_epochs"), "gpus": "trainer.devices",
    **dict.fromkeys(("train_batch_size", "per_device_train_batch_size"), "data.batch_size"), "num_workers": "data.workers",
    "max_seq_length": "data.max_length", "model_name_or_path": "model.backbone.name", "output": "output_dir",
    # version 0.1
    "threads": "num_threads", "start_from": "init_from", "schedule": "scheduler", "keep": "keep_last", "batches": "sampler",
}  # fmt: skip
EXTRAS = {  # of pyproject.toml, by words of the error of what imports them without us
    "tensorboard": "tensorboard", "optuna": "sweeps", "joblib": "sweeps", "submitit": "sweeps", "ray": "ray",
}  # fmt: skip
AMBIGUOUS = re.compile(r"Ambiguous value for argument '([^=']+)=([^']*)'")
OWN_DATA = ("path", "columns", "label", "image")  # keys of data=text and data=images


def explain(error: BaseException, command: str) -> str:
    """One message for any exception; the parameters that an ``InputError`` names become full configuration keys."""
    chain = _chain(error)
    for i, cause in enumerate(chain):
        if isinstance(cause, InputError):
            owners = _owners(chain[: i + 1])
            # Of each parameter the key in the first component that has it.
            keys = {p: [components.settable_key(owner, p) for owner in owners] for p in cause.parameters()}
            text = cause.rename({p: key for p, found in keys.items() if (key := next(filter(None, found), None))})
            names_key = cause.parameters() or not owners or "=" in text.split(":")[0] or text.startswith(owners[0])
            return text if names_key else f"{hydra_compat.source_key(components.raw_config(), owners[0])}: {text}"
    text = " ".join(str(error).split())
    if isinstance(error, errors.OverrideParseException):
        return f"{error.override}: cannot be read ({text}). Quote it: 'key=\"value\"'."
    if isinstance(error, ValueError) and (group := hydra_compat.failed_group(error)):
        return f"{group}: the name of a choice of this group is needed. `--help` lists them."
    if isinstance(error, errors.MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, errors.HydraException) and (found := AMBIGUOUS.search(text)):
        key, value = found.groups()
        return f"{key}={value}: a list is written in brackets, as {key}=[{value}]. With -m a run is made for each value."
    if isinstance(error, errors.ConfigCompositionException):
        return _mistyped(error, command)
    if isinstance(error, (config_errors.MissingMandatoryValue, config_errors.InterpolationToMissingValueError)):
        missing = re.search(r"Missing mandatory value: (\S+)", str(error))  # where an interpolation leads to
        key = missing[1] if missing else error.full_key
        return f"{key} must be given: {key}=..."
    if isinstance(error, config_errors.InterpolationKeyError) and (found := re.search(r"'model\.(tokenizer|pixels)'", text)):
        if found[1] == "tokenizer":
            return "data holds text, but model reads images. Use model=minilm, or data=images."
        return "data holds images, but model reads text. Use model=resnet_small, or data=text."
    if isinstance(error, (config_errors.ConfigAttributeError, config_errors.ConfigKeyError)) and error.full_key:
        return f"{error.full_key} is needed, but the configuration lacks it: leave out the override that removes it."
    where = re.search(r"full_key: (\S+)", str(error)) if isinstance(error, errors.InstantiationException) else None
    place = f"{hydra_compat.source_key(components.raw_config(), where[1])}: " if where else ""
    if isinstance(error, (errors.HydraException, config_errors.OmegaConfBaseException)) and not where:
        return text
    if override := hydra_compat.failed_override(error):
        return f"{override}: it cannot be applied ({text}). An item of a list is changed by giving the whole list."
    if where and isinstance(error.__cause__, (TypeError, ValueError)) and not str(error).startswith("tercet."):
        return place + " ".join(str(error.__cause__).split())  # a library's constructor refuses a value
    return place + _library_error(error.__cause__ or error if where else error, command)


def _library_error(error: BaseException, command: str) -> str:
    """The message for an exception of a library: those whose words are for users; the others with a hint how to find them."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename:
        written = "output_dir is the folder that a run" if command == "train" else f"output is what `{command}`"
        return f"{error.filename}: {error.strerror}. {written} writes, data.path what it reads."
    if kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in text:
        advice = "Use a smaller data.batch_size, model or head, or model.execution.recompute=true with .chunk_tokens=auto"
        return f"There is too little memory ({text[:200] or kind}). {advice}."
    if isinstance(error, ImportError) and (extra := next((EXTRAS[name] for name in EXTRAS if name in text), None)):
        return f"{text.rstrip('.')}. It comes with: pip install 'tercet[{extra}]'."
    if kind == "MisconfigurationException":  # Lightning's
        return text
    return f"{kind}: {text or 'no message'} (TERCET_DEBUG=1 shows where)"


def _chain(error: BaseException | None) -> list[BaseException]:
    """The exception, its cause, the cause of that, and so on."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def _owners(chain: list[BaseException]) -> list[str]:
    """The keys of the components whose methods or constructors raised the last of the exceptions, the innermost first."""
    frames = [frame for cause in reversed(chain) for frame, _ in reversed(list(traceback.walk_tb(cause.__traceback__)))]
    return list(dict.fromkeys(filter(None, map(_owner, frames))))


def _owner(frame: FrameType) -> str | None:
    if frame.f_code is components.create.__code__:  # a constructor or function: there is no object yet
        return str(frame.f_locals["key"])
    return components.component_key(frame.f_locals.get("self"))


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
    group, _, name = key.partition(".")
    if command == "train" and group == "data" and name in OWN_DATA:
        return f"{key}: the data of this run has no such key. Add data=text for texts of your own, data=images for images."
    inside = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = [k for k in (ELSEWHERE.get(key),) if k in known]
    near = near or (inside if "." not in key else []) or difflib.get_close_matches(key, known, 1, 0.5) or inside
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{key}: there is no such key.{hint} `--cfg job` prints all keys with their values."

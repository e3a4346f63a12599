"""Build components from the configuration, and check values against annotations."""

import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from tercet.errors import InputError


def build(node: Any, **extra: Any) -> Any:
    """Hydra's ``instantiate``, with plain lists and dicts inside: OmegaConf would take our dataclasses for configuration."""
    return instantiate(node, _convert_="all", **extra)


SPECIAL = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
SCALARS = (bool, int, float, str, type(None))


def check_values(cfg: DictConfig, raw: DictConfig) -> None:
    """Raise ``InputError`` for a key that its target does not take, and for a scalar of a type that a parameter does not.

    ``cfg`` is resolved; ``raw`` still holds the interpolations, so that the key which the user can set is named.
    """
    for place, node in _targets(OmegaConf.to_container(cfg, resolve=True), ""):
        _check_keys(raw, place.lstrip("."), node)
        hints = _hints(node["_target_"])
        for name, value in node.items():
            if name in hints and isinstance(value, SCALARS) and not takes(hints[name], value):
                key = _key(raw, f"{place}.{name}".lstrip("."))
                raise InputError(f"{key}={value}: {_said(hints[name])} is needed here, this is {type(value).__name__}.")


def _check_keys(raw: DictConfig, place: str, node: dict[str, Any]) -> None:
    """An experiment may have set what only another choice of the group has."""
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in node.keys() - parameters.keys() - SPECIAL:
        key = _key(raw, f"{place}.{name}".lstrip("."))
        raise InputError(
            f"{key}={node[name]}: {node['_target_'].rsplit('.', 1)[-1]} does not take it; it takes {', '.join(parameters)}. "
            f"Leave it out with '~{key}'."
        )


def _targets(node: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield place, dict(node)
        for name, value in node.items():
            yield from _targets(value, f"{place}.{name}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _targets(value, f"{place}.{i}")


def _hints(target: str) -> dict[str, Any]:
    called = get_object(target)
    if isinstance(called, type):
        called = vars(called).get("__init__", called)
    try:
        return typing.get_type_hints(called)
    except (NameError, TypeError):  # a library's annotations may name what is only imported for type checkers
        return {k: p.annotation for k, p in inspect.signature(called).parameters.items() if isinstance(p.annotation, type)}


def takes(hint: Any, value: Any) -> bool:
    """Whether a scalar may be given where ``hint`` stands; whole numbers may stand for fractions."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(takes(part, value) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint) or str(value) in typing.get_args(hint)
    if origin is not None or not isinstance(hint, type) or getattr(hint, "_is_protocol", False):
        return False
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint) or (hint is float and isinstance(value, int)) or (_is_path(hint) and isinstance(value, str))


def _is_path(hint: type) -> bool:
    return hasattr(hint, "__fspath__")


def _said(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_said(part) for part in typing.get_args(hint)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return words.get(hint) or ("a list" if origin else str(getattr(hint, "__name__", hint)))


def _key(raw: DictConfig, key: str) -> str:
    """The key behind an interpolation: ``data.module.batch_size`` holds ``${data.batch_size}``."""
    node: Any = OmegaConf.to_container(raw, resolve=False)
    parts = key.split(".")
    for i, part in enumerate(parts):
        if isinstance(node, str):  # the whole node comes from elsewhere
            return _key(raw, ".".join([node[2:-1], *parts[i:]])) if _plain(node) else key
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node[2:-1] if isinstance(node, str) and _plain(node) else key


def _plain(text: str) -> bool:
    """Is it one interpolation of a key, and nothing more?"""
    return text.startswith("${") and text[2] != "." and ":" not in text and text.count("$") == 1

"""Build components from the configuration, check values against annotations, and name the key that sets a parameter."""

import inspect
import types
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tercet.app.hydra_compat import full_key
from tercet.errors import InputError

SPECIAL = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
SCALARS = (bool, int, float, str, type(None))


class _Run:
    """The configuration as composed (interpolations unresolved), and the key of each component that was built from it."""

    raw: typing.ClassVar[DictConfig] = OmegaConf.create({})
    keys: typing.ClassVar[dict[int, tuple[Callable[[], Any], str]]] = {}


def start_record(raw: DictConfig) -> None:
    """Begin a run: components are recorded anew, and keys are looked up in ``raw``."""
    _Run.raw, _Run.keys = raw, {}


def raw_config() -> DictConfig:
    """The configuration of the run, its interpolations unresolved; other processes are given it."""
    return _Run.raw


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a node and the nodes inside it, as ``hydra.utils.instantiate`` does with plain lists and dicts.

    Hydra does not tell which object it built from which node, so each target is instantiated by itself and recorded:
    ``component_key`` finds the key of an object. ``extra`` replaces keys of the outermost node.

    Raises:
        InstantiationException: a target raised an exception, which is its cause.
    """
    config = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    return _build(config, full_key(node), extra)


def _build(node: Any, key: str, extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(value, _join(key, str(i)), {}) for i, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    values = {name: value for name, value in node.items() if name not in SPECIAL and name not in extra}
    if node.get("_recursive_") is not False:
        values = {name: _build(value, _join(key, name), {}) for name, value in values.items()}
    values |= extra
    return call_target(node, key, values) if "_target_" in node else values


def call_target(node: dict[str, Any], key: str, values: dict[str, Any]) -> Any:
    """Call a node's target; ``error_formatting`` reads ``key`` in the traceback of what is not built yet."""
    make = instantiate({"_target_": node["_target_"], "_partial_": True})
    arguments = node.get("_args_", [])
    if node.get("_partial_"):
        return record(Partial(make, arguments, values, key), key)
    try:
        return record(make(*arguments, **values), key)
    except Exception as error:
        raise InstantiationException(f"{node['_target_']}: {error!r}\nfull_key: {key}") from error


class Partial:
    """A target with some of its arguments; what it makes is recorded under the same key."""

    def __init__(self, make: Callable[..., Any], arguments: list[Any], keywords: dict[str, Any], key: str) -> None:
        self.make, self.arguments, self.keywords, self.key = make, arguments, keywords, key

    def __call__(self, *more: Any, **extra: Any) -> Any:
        """Call the target with the rest of its arguments."""
        return record(self.make(*self.arguments, *more, **{**self.keywords, **extra}), self.key)


def record(component: Any, key: str) -> Any:
    """Remember the key that a component was built from; returns the component."""
    if type(component).__module__ != "builtins" and component_key(component) is None:
        try:
            found: Callable[[], Any] = weakref.ref(component)
        except TypeError:  # slots without __weakref__
            found = lambda: component  # noqa: E731
        _Run.keys[id(component)] = found, key
    return component


def component_key(component: Any) -> str | None:
    """The key of the node that a component was built from, or None for any other object."""
    found, key = _Run.keys.get(id(component), (lambda: None, ""))
    return key if found() is component and component is not None else None


def settable_key(component: str, parameter: str) -> str | None:
    """The full key that sets a ``parameter`` of the component at a key: what a user can give on the command line.

    The parameter is looked for in the component's node, then in the nodes inside it, then in those around it.
    Interpolations are followed: ``data.module.batch_size`` holds ``${data.batch_size}``, which is the key to set.
    """
    config = _plain(_Run.raw, resolve=True)
    around = component.split(".")
    places = [*_nodes(config, component), *(".".join(around[:i]) for i in range(len(around) - 1, 0, -1))]
    for place in places:
        if _at(config, key := _join(place, parameter)) is not None:
            return source_key(key)
    return None


def _nodes(config: Any, key: str) -> Iterator[str]:
    """The keys of a node and of all nodes inside it, the outer ones first."""
    level = [key]
    while level:
        yield from level
        found = [(name, _at(config, name)) for name in level]
        inner = [(name, dict(enumerate(node[0])) if isinstance(node[0], list) else node[0]) for name, node in found if node]
        level = [_join(name, str(child)) for name, node in inner if isinstance(node, dict) for child in node]


def _at(config: Any, key: str) -> tuple[Any] | None:
    """The value at a key, in a tuple; or None where there is no such key."""
    for part in key.split("."):
        if isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict) and part in config:
            config = config[part]
        else:
            return None
    return (config,)


def source_key(key: str, raw: DictConfig | None = None) -> str:
    """The key behind an interpolation: ``data.module.batch_size`` holds ``${data.batch_size}``."""
    config, seen = _plain(_Run.raw if raw is None else raw, resolve=False), {key}
    parts = key.split(".")
    i = 1
    while i <= len(parts):
        node = _at(config, ".".join(parts[:i]))
        if node is None:
            break
        if (target := _target_of(node[0], parts[:i])) is None:
            i += 1
            continue
        parts, i = [*target, *parts[i:]], 1
        if ".".join(parts) in seen:
            break
        seen.add(".".join(parts))
    return ".".join(parts)


def _target_of(value: Any, place: list[str]) -> list[str] | None:
    """The parts of the key that a value interpolates, if it is one interpolation of a key and nothing more."""
    if (
        not isinstance(value, str)
        or not value.startswith("${")
        or not value.endswith("}")
        or value.count("$") > 1
        or ":" in value
    ):
        return None
    name = value[2:-1]
    up = len(name) - len(name.lstrip("."))
    return [*(place[: len(place) - up] if up else []), *name.lstrip(".").split(".")]


def _plain(config: DictConfig, resolve: bool) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=resolve)
    except OmegaConfBaseException:  # something is not given, or names what is not there
        return OmegaConf.to_container(config, resolve=False)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def check_values(cfg: DictConfig, raw: DictConfig) -> None:
    """Raise ``InputError`` for a key that its target does not take, and for a scalar of a type that a parameter does not.

    ``cfg`` is resolved; ``raw`` still holds the interpolations, so that the key which the user can set is named.
    """
    for place, node in find_targets(OmegaConf.to_container(cfg, resolve=True)):
        _check_keys(raw, place, node)
        hints = _hints(node["_target_"])
        for name, value in node.items():
            if name in hints and isinstance(value, SCALARS) and not takes(hints[name], value):
                key = source_key(_join(place, name), raw)
                raise InputError(f"{key}={value}: {_words(hints[name])} is needed here, this is {type(value).__name__}.")


def _check_keys(raw: DictConfig, place: str, node: dict[str, Any]) -> None:
    """An experiment may have set what only another choice of the group has."""
    parameters = inspect.signature(get_object(node["_target_"])).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in node.keys() - parameters.keys() - SPECIAL:
        key = source_key(_join(place, name), raw)
        raise InputError(
            f"{key}={node[name]}: {node['_target_'].rsplit('.', 1)[-1]} does not take it; it takes {', '.join(parameters)}. "
            f"Leave it out with '~{key}'."
        )


def find_targets(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes that have a target, each with its key, in a plain dict or list; ``key`` is that of the node itself."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, dict(node)
        for name, value in node.items():
            yield from find_targets(value, _join(key, str(name)))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from find_targets(value, _join(key, str(i)))


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
    is_path = hasattr(hint, "__fspath__") and isinstance(value, str)
    return isinstance(value, hint) or (hint is float and isinstance(value, int)) or is_path


def _words(hint: Any) -> str:
    """An annotation in words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in typing.get_args(hint)))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return words.get(hint) or ("a list" if origin else str(getattr(hint, "__name__", hint)))

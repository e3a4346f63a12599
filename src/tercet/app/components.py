"""Build components from the configuration, check values against annotations, and name the key that sets a parameter."""

import functools
import inspect
import math
import re
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tercet.app.hydra_compat import full_key, source_key
from tercet.errors import InputError, require

SPECIAL = {"_target_": str, "_partial_": bool, "_convert_": str, "_recursive_": bool, "_args_": list}  # Hydra's own keys
SCALARS = (bool, int, float, str, type(None))
SETTINGS: dict[str, Any] = {  # what a key takes that belongs to no component; a list of others is of numbers with limits
    **dict.fromkeys(("check", "dry_run", "hybrid", "jobs", "measure_before", "private", "resume", "yes"), bool),
    **dict.fromkeys(("artifacts", "card.base_model", "card.license", "card.title", "index", "init_from", "key", "metric",
                     "model.pooling", "model.prompt", "monitor", "monitor_mode", "optimized_metric", "other",
                     "output", "outputs", "query", "revision", "run_name", "served_name", "similarity", "stages.in_domain",
                     "stages.out_of_domain", "vectors"), str | None),
    **dict.fromkeys(("device", "folder", "format", "host", "kind", "output_dir", "precision", "projection", "repo",
                     "save_dtype", "side", "split"), str),
    **dict.fromkeys(("callback", "card", "data", "expected", "logger", "model", "stages", "stages.runs", "trainer"), dict),
    **dict.fromkeys(("data.batch_size", "k", "keep_last", "negatives", "num_processes", "points", "port", "seed",
                     "skip", "workers"), int),
    **dict.fromkeys(("data.name", "name"), str | int),
    **dict.fromkeys(("last", "model.max_length", "num_threads"), int | None),
    **dict.fromkeys(("latency_ms", "recall"), float),
    **dict.fromkeys(("command", "runs", "words"), list | str),
    "model.normalize": bool | None, "model.path": list | str | None, "run_length": dict | None,
    **dict.fromkeys(("older_than", "tolerance"), float | None),
    "save_every": int | str | None, **dict.fromkeys(("card.datasets", "card.language", "state"), list | str | None),
}  # fmt: skip
COMPONENTS = ("data.module", "data.train", "loss", "objective", "optimizer", "sampler", "scheduler", "test", "trainer",
              "limits", "validation", "view", "evaluation", "guard")  # fmt: skip
CALLED = ("optimizer", "sampler", "scheduler")  # by training, with what is known only then: _partial_=true
LIMITS: dict[str, tuple[float, float, str]] = {  # of numbers that no component checks: least, largest, what else is taken
    "last": (1, math.inf, " (null: all)"), "older_than": (0, math.inf, " (days)"),
    "seed": (0, 2**32 - 1, ""), "num_threads": (1, 4096, " (null: as many as torch chooses)"), "keep_last": (1, 1000, ""),
    "k": (1, math.inf, ""), "num_processes": (1, 1024, ""), "port": (0, 65535, ""), "workers": (1, 256, ""),
    "latency_ms": (0, 10_000, ""),
    "negatives": (1, 1000, ""), "skip": (0, math.inf, ""), "model.max_length": (1, math.inf, ""),
    **{f"trainer.{name}": (1, math.inf, ", or -1: no limit") for name in ("max_steps", "max_epochs")},
    **{f"trainer.{name}": (1, math.inf, "") for name in (
        "accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps", "min_epochs", "min_steps", "num_nodes")},
    "trainer.gradient_clip_val": (0, math.inf, ""), "trainer.num_sanity_val_steps": (-1, math.inf, ""),
}  # fmt: skip


class _Run:
    """The configuration as composed (interpolations unresolved), and the key of each component that was built from it."""

    raw: ClassVar[DictConfig] = OmegaConf.create({})
    keys: ClassVar[dict[int, tuple[Callable[[], Any], str]]] = {}


def start_record(raw: DictConfig) -> None:
    """Begin a run: components are recorded anew, and keys are looked up in ``raw``."""
    _Run.raw, _Run.keys = raw, {}


def raw_config() -> DictConfig:
    """The configuration of the run, its interpolations unresolved; other processes are given it."""
    return _Run.raw


def build(node: Any, **extra: Any) -> Any:
    """Instantiate a node and the nodes inside it, as ``hydra.utils.instantiate`` does with plain lists and dicts.

    Hydra does not tell which object it built from which node, so each target is instantiated by itself and recorded.
    ``extra`` replaces keys of the outermost node. ``InstantiationException``: a target raised an exception, its cause.
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
    if "_target_" not in node:
        return values
    target = locate_target(node, key)
    _check_made(target, key, node, values)
    make = functools.partial(create, target, key, *node.get("_args_", []), **values)
    if node.get("_partial_"):
        return record(make, key)
    _check_given(target, key, make)
    try:
        return make()
    except Exception as error:
        raise InstantiationException(f"{node['_target_']}: {error!r}\nfull_key: {key}") from error


def locate_target(node: Mapping[str, Any], key: str) -> Any:
    """The class or function that a node names as its ``_target_``; ``InputError`` names the ``key`` of the node."""
    name = node["_target_"]
    try:
        target = get_object(name)
    except Exception as error:  # importing a module runs its code
        raise InputError(f"{_join(key, '_target_')}={name}: it cannot be imported ({' '.join(str(error).split())}).") from error
    require(callable(target), f"{_join(key, '_target_')}={name}: a class or function is needed, this is {_kind(target)}.")
    return target


def _check_given(target: Any, key: str, make: functools.partial[Any]) -> None:
    """Raise ``InputError`` where a parameter of ``target`` that has no default is not given."""
    try:
        inspect.signature(target).bind(*make.args[2:], **make.keywords)
    except ValueError:  # some functions of C have no signature
        return
    except TypeError as error:
        place, missing = source_key(_Run.raw, key), re.match("missing a required .*'(.+)'", str(error))
        advice = f" Give {place}.{missing[1]}." if missing else ""
        advice = f" Training gives it: {place}._partial_=true." if missing and place in CALLED else advice
        raise InputError(f"{place}._target_={target.__name__}: {error}.{advice}") from None


def _check_made(target: Any, key: str, node: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for a value that a nested ``_target_`` made and the parameter of ``target`` does not take."""
    hints = _hints(target)
    for name in hints.keys() & values.keys():
        for place, hint, made in _made(_join(key, name), hints[name], node.get(name), values[name]):
            fits = takes(hint, made) if isinstance(made, SCALARS) else _fits(hint, made)
            require(fits, f"{source_key(_Run.raw, place)}: {_words(hint)} is needed, its _target_ makes {_kind(made)}.")


def _made(key: str, hint: Any, node: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """What nested targets made, here and inside of lists and groups of keys: each with its key and its annotation."""
    if (isinstance(node, dict) and "_target_" in node) or not isinstance(value, (*SCALARS, list, dict, tuple)):
        yield key, hint, value
    elif isinstance(node, list | dict) and isinstance(value, list | dict):
        is_list = isinstance(node, list)
        for name in range(len(node)) if is_list else node:
            yield from _made(_join(key, str(name)), _inside(hint, is_list), node[name], value[name])


def create(target: Callable[..., Any], key: str, /, *arguments: Any, **values: Any) -> Any:
    """Call a target and record the result; in the traceback of an error ``error_formatting`` finds the ``key`` here."""
    return record(target(*arguments, **values), key)


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
    try:
        plain = OmegaConf.to_container(_Run.raw, resolve=True)
    except OmegaConfBaseException:  # something is not given, or names what is not there
        plain = OmegaConf.to_container(_Run.raw, resolve=False)
    known = dict.fromkeys(key for key, _ in walk(plain))
    inside = sorted((key for key in known if f"{key}.".startswith(f"{component}.")), key=lambda key: key.count("."))
    parts = component.split(".")
    around = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
    keys = (_join(place, parameter) for place in (*inside, *around))
    return next((source_key(_Run.raw, key) for key in keys if key in known), None)


def walk(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """A node of plain dicts and lists, whose key is ``key``, and all that is inside it, each with its key."""
    yield key, node
    inside = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, value in inside:
        yield from walk(value, _join(key, str(name)))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def check_settings(cfg: DictConfig) -> None:
    """Raise ``InputError`` for a number that is not finite, wherever it is, and for what a key of no component does not take.

    Interpolations that cannot be resolved yet are left aside.
    """
    values = {key: _resolved(cfg, key, value) for key, value in walk(OmegaConf.to_container(cfg, resolve=False))}
    for key, value in values.items():
        if isinstance(value, float):
            require(math.isfinite(value), f"{key}={value}: a finite number is needed.")
        if isinstance(value, int):
            require(abs(value) < 1 << 63, f"{key}={value}: a whole number of 64 bits is needed.")
    for key, hint in SETTINGS.items():
        value = values.get(key)
        if key in values and value != "???" and "${" not in str(value) and not takes(hint, value):
            raise _wrong_type(key, hint, value)
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        if name in SPECIAL and not takes(SPECIAL[name], value):
            raise _wrong_type(key, SPECIAL[name], value)
        is_part = key in COMPONENTS or (group in ("callback", "logger") and name and value is not None)
        if is_part and not (isinstance(value, dict) and isinstance(value.get("_target_"), str)) and "${" not in str(value):
            raise InputError(f"{key}={_shown(value)}: a component is needed, a group of keys with a _target_.")
        if is_part and key not in CALLED and isinstance(value, dict) and value.get("_partial_"):
            raise InputError(f"{key}._partial_={_shown(value['_partial_'])}: the component itself is needed. Leave it out.")
    for key, (least, largest, others) in LIMITS.items():
        value = values.get(key)
        if isinstance(value, int | float) and not (least <= value <= largest or (value == -1 and "-1" in others)):
            above = f"from {least:g} to {largest}" if math.isfinite(largest) else f"of {least:g} or more"
            raise InputError(f"{key}={value}: a number {above}{others} is needed.")


def _resolved(cfg: DictConfig, key: str, value: Any) -> Any:
    """The value of a key, an interpolation replaced by what it refers to where that is known; not one of Hydra's own state."""
    if not isinstance(value, str) or "${" not in value or "${hydra:" in value:
        return value
    try:
        found = OmegaConf.select(cfg, key, default=value)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException:
        return value


def check_values(cfg: DictConfig, raw: DictConfig) -> None:
    """Raise ``InputError`` for a key that its target does not take, and for a scalar of a type that a parameter does not.

    ``cfg`` is resolved; ``raw`` still holds the interpolations, so that the key which the user can set is named.
    """
    for place, node in find_targets(OmegaConf.to_container(cfg, resolve=True)):
        target = locate_target(node, source_key(raw, place))
        parameters = inspect.signature(target).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # An experiment may have set what only another choice of the group has.
        for name in () if open_ended else node.keys() - parameters.keys() - SPECIAL.keys():
            # The name itself, also where it holds an interpolation: removing what it refers to would not help.
            key, accepted = _join(source_key(raw, place), name), ", ".join(parameters)
            fault = f"{target.__name__} does not take it; it takes {accepted}"
            raise InputError(f"{key}={node[name]}: {fault}. Leave it out with '~{key}'.")
        for name, annotation in _hints(target).items():
            for inner, hint, value in _plain_parts(_join(place, name), annotation, node[name]) if name in node else ():
                if isinstance(value, (*SCALARS, list, dict)) and not takes(hint, value):
                    raise _wrong_type(source_key(raw, inner), hint, value)


def _plain_parts(key: str, hint: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """The value, or the largest parts of it that hold no target, each with its key and its annotation."""
    if not find_targets(value):
        yield key, hint, value
    elif "_target_" not in value:
        for name in range(len(value)) if isinstance(value, list) else value:
            yield from _plain_parts(_join(key, str(name)), _inside(hint, isinstance(value, list)), value[name])


def _inside(hint: Any, of_list: bool) -> Any:
    """The annotation of what a list or a group of keys holds whose own is ``hint``."""
    arms = [get_args(arm) for arm in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,))]
    return next((arm[0 if of_list else -1] for arm in arms if arm), Any)


def find_targets(node: Any, key: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The nodes that have a target, each with its key, in a plain dict or list; ``key`` is that of the node itself."""
    return [(place, part) for place, part in walk(node, key) if isinstance(part, dict) and "_target_" in part]


def _hints(target: Any) -> dict[str, Any]:
    called = vars(target).get("__init__", target) if isinstance(target, type) else target
    try:
        return get_type_hints(called)
    except (NameError, TypeError):  # a library's annotations may name what is only imported for type checkers
        return {k: p.annotation for k, p in inspect.signature(called).parameters.items() if isinstance(p.annotation, type)}


def takes(hint: Any, value: Any) -> bool:
    """Whether plain values may be given where ``hint`` stands; 1 stands for a fraction, too, and inside of lists for a text."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if isinstance(value, list) and isinstance(origin, type) and (origin is tuple or issubclass(list, origin)):
        hints = inside if origin is tuple and ... not in inside else [inside[0]] * len(value)
        pairs = zip(hints, value, strict=False)
        return len(value) == len(hints) and all(takes(part, x) or (part is str and type(x) is int) for part, x in pairs)
    if origin in (Union, types.UnionType):
        return any(takes(part, value) for part in inside)
    if origin is Literal:
        return value in get_args(hint) or str(value) in get_args(hint)
    if isinstance(value, dict) and isinstance(origin, type):
        return issubclass(dict, origin) and all(takes(inside[-1], x) for x in value.values())
    if origin is not None or not isinstance(hint, type) or getattr(hint, "_is_protocol", False):
        return False
    if isinstance(value, bool):
        return hint is bool
    is_path = hasattr(hint, "__fspath__") and isinstance(value, str)
    return isinstance(value, hint) or (hint is float and isinstance(value, int)) or is_path


def _fits(hint: Any, made: Any) -> bool:
    """Whether an object may be given where ``hint`` stands, as far as that is a class or several; protocols are not checked."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    are_classes = all(isinstance(p, type) and p is not Any and not get_origin(p) for p in parts)
    return not are_classes or any(getattr(p, "_is_protocol", False) or isinstance(made, p) for p in parts)


def _wrong_type(key: str, hint: Any, value: Any) -> InputError:
    return InputError(f"{key}={_shown(value)}: {_words(hint)} is needed here, this is {_kind(value)}.")


def _words(hint: Any) -> str:
    """An annotation in words."""
    words = {
        int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null", list: "a list",
        dict: "a group of keys",
    }  # fmt: skip
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, get_args(hint))))
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if isinstance(origin, type) and issubclass(dict, origin):
        return f"a group of keys, each of them {_words(get_args(hint)[-1])},"
    if origin is tuple and ... not in get_args(hint):
        return f"a list of {len(get_args(hint))} values"
    return words.get(hint) or ("a list" if origin else str(getattr(hint, "__name__", hint)))


def _kind(value: Any) -> str:
    """The type of a value in words."""
    return _words(type(value))


def _shown(value: Any) -> str:
    """A value as the command line has it, cut to a length that can be read."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

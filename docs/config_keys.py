"""The keys of conf/: each with its type, its default and what it means.

A meaning is the comment beside a key; else, of an interpolation, the key that it follows; else what the docstring of the
component says of the parameter.
"""

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.utils import get_object
from transformers import CONFIG_MAPPING

from tercet.app.components import SETTINGS

CONF = Path(__file__).resolve().parents[1] / "conf"
CHECKS = {  # the functions that check the choices of a command's own keys
    "app": "tercet.app.commands.app.run",
    "encode": "tercet.search.encode_to",
    "export": "tercet.models.export.export_model",
    "search": "tercet.search.Index.build",
    "train": "tercet.models.folder.save_model",
}


@dataclass(frozen=True)
class Key:
    """One key: its default as written, the type it takes, what it means, and the key that its value comes from."""

    name: str
    default: str
    type: str
    meaning: str
    target: str = ""  # of a block that is a component
    follows: str = ""


@dataclass(frozen=True)
class Written:
    """A key as the files have it: the value as text, and of a plain one the name of its type; a block has no text."""

    text: str
    kind: str
    comment: str
    is_block: bool = False


# The files


def load(path: Path) -> dict[str, Any]:
    """A configuration file as plain values."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def header(path: Path) -> list[str]:
    """The lines of the comment at the head of a file, with what they are indented by."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line[1:].removeprefix(" ") for line in lines[:end] if not line.startswith("# @package")]


def package(path: Path) -> str:
    """What the keys of a choice begin with: the name of its group, or what the file says in its first line."""
    first = re.match(r"# @package (\S+)", path.read_text(encoding="utf-8"))
    name = first[1] if first else path.parent.relative_to(CONF).as_posix().replace("/", ".")
    return "" if name == "_global_" else f"{name}."


def layers(path: Path, before: str) -> Iterator[tuple[Path, str]]:
    """The files that a file is built on and the file itself, in their order, each with what its keys begin with."""
    items = load(path).get("defaults", [])
    for item in items if "_self_" in items else [*items, "_self_"]:
        if isinstance(item, dict):  # a choice of a group: of a command's own file it is on the page of the group
            (group, choice), *_ = item.items()
            if path.parent == CONF or group.startswith("override") or "@" not in group:
                continue
            name, _, place = group.partition("@")
            item = f"{name}/{choice}@{place}"
        name, _, place = item.partition("@")
        if name == "_self_":
            yield path, before
        else:
            file = (CONF / name.strip("/") if name.startswith("/") else path.parent / name).with_suffix(".yaml")
            yield file, before if place in ("", "_here_", "_global_") else f"{before}{place}."


@cache
def _written(path: Path, before: str) -> dict[str, Written]:
    """The keys of a file and of all that it is built on; a later value stands, and a comment until there is another."""
    found: dict[str, Written] = {}
    for file, place in layers(path, before):
        layer = _own(file, place) if file == path else _written(file, place)
        if place != before:
            about = "" if f"{place}_target_" in layer else " ".join(header(file))
            found.setdefault(place[:-1], Written("", "", about, is_block=True))
        for name, value in layer.items():
            old = found.get(name, value)
            found[name] = replace(value, comment=value.comment or old.comment)
    return found


def _own(path: Path, before: str) -> dict[str, Written]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, Written] = {}

    def walk(items: list[tuple[str, Any, yaml.Node]], prefix: str) -> None:
        for key, mark, value in items:
            if prefix == before and key in ("defaults", "hydra"):
                continue
            inner = _inside(value)
            # The comment stands behind the value, or behind the key where the value goes over several lines.
            end = mark if inner or value.end_mark.line != mark.line else value.end_mark
            comment = re.match(r"[^#]*?\s*#\s?(.*)", lines[end.line][end.column :])
            text = lines[mark.line][value.start_mark.column : value.end_mark.column] if end is not mark else "…"
            about = comment[1] if comment else ""
            found[prefix + key] = Written("" if inner else text or "null", "" if inner else _kind(value), about, bool(inner))
            walk(inner, f"{prefix}{key}.")

    walk(_inside(yaml.compose("\n".join(lines))), before)
    return found


def _inside(node: yaml.Node | None) -> list[tuple[str, Any, yaml.Node]]:
    """The keys of a block, or the numbers of the components of a list, each with the place where it ends and its value."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        return [(key.value, key.end_mark, value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in node.value):
        return [(str(i), item.start_mark, item) for i, item in enumerate(node.value)]
    return []


def _kind(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "list" if isinstance(node, yaml.SequenceNode) else "dict"
    value = yaml.safe_load(node.value) if node.style is None else ""
    return "" if value is None or node.value.startswith(("$", "?")) else type(value).__name__


# The keys


@cache
def read_keys(path: Path, before: str = "") -> dict[str, Key]:
    """The keys of a file and of the files that it is built on, in their order."""
    written = _written(path, before)
    return {name: _key(name, written, path) for name in written if not name.rpartition(".")[2].startswith("_")}


def _key(name: str, written: dict[str, Written], path: Path) -> Key:
    value, (target, parameter, inside) = written[name], _owner(name, written)
    config = written.get(name.rpartition(".")[0] + ".model_type")
    about = parameter_meaning(target, parameter) if parameter and not inside else ""
    kind = parameter_type(target, parameter) if parameter and not inside else ""
    if config and inside != "model_type":
        kind, about = _of_config(config.text, inside)
    own = written[f"{name}._target_"].text if f"{name}._target_" in written else ""
    follows = _source(name, value.text)
    value = replace(value, kind=value.kind or (written[follows].kind if follows in written else ""))
    value = replace(value, kind=value.kind or "dict" * (follows != "" and (CONF / follows).is_dir()))
    if not target:  # a key of no component: the parameters that are given its value
        followers = (other for other in written if _source(other, written[other].text) == name)
        for target, parameter, rest in (_owner(other, written) for other in followers):
            if target and not rest:
                kind, about = kind or parameter_type(target, parameter), about or parameter_meaning(target, parameter)
    kind = kind or _setting(name, path) or value.kind or ("dict" if value.is_block else "")
    if own and documentation(own):
        about = _plain(_sentences(documentation(own)[0])[0])
    meaning = value.comment or (f"the value of `{follows}`" if follows else about) or _by_place(name, inside, written)
    key = Key(name, value.text, kind, meaning, own, follows)
    return key if key.type and key.meaning else _completed(key, path)


def _by_place(name: str, inside: str, written: dict[str, Written]) -> str:
    """What a key means by the block that it is in, or as the name of a group."""
    block = name.rpartition(".")[0]
    if name.startswith("hydra.sweeper.params"):
        searched = name.removeprefix("hydra.sweeper.params").lstrip(".")
        return f"the values of `{searched}` that are tried" if searched else "the keys that a sweep changes, with their values"
    if (CONF / name).is_dir():
        return f"keys of the group `{name}=`"
    if inside or (block in written and written[block].comment):
        return f"an entry of `{block}`"
    return ""


def _completed(key: Key, path: Path) -> Key:
    """A key with the type and the meaning that it has in other choices of its group, or in the command's own file."""
    for name in filter(None, (key.name, key.follows)):
        group = (CONF / name.split(".")[0]).glob("*.yaml")
        for file in [*sorted(group), CONF / "train.yaml"]:
            written = _written(file, "" if file.parent == CONF else package(file))
            if file != path and (other := written.get(name)):
                kind = other.kind or "dict" * other.is_block
                kind += " | null" * bool(kind and key.default == "null")
                key = replace(key, type=key.type or kind, meaning=key.meaning or other.comment)
    return key


def _owner(name: str, written: dict[str, Written]) -> tuple[str, str, str]:
    """The target of the nearest component around a key, its parameter, and the rest of the key inside of that."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        target = written.get(".".join([*parts[:i], "_target_"]))
        if target:
            return target.text, parts[i], ".".join(parts[i + 1 :])
    return "", "", ""


def _source(name: str, text: str) -> str:
    """The key that an interpolation follows, where it is nothing else: ``${data.path}``, ``${..tokenizer}``."""
    found = re.fullmatch(r"\$\{(?:oc\.select:)?(\.*)([\w.]+)(?:,null)?\}", text)
    if not found or not found[1]:
        return found[2] if found else ""
    return ".".join([*name.split(".")[: -len(found[1])], found[2]])


def _setting(name: str, path: Path) -> str:
    """The type of a key that belongs to no component, as the command line checks it."""
    if path.parent == CONF and name in (found := choices(CHECKS[path.stem])) if path.stem in CHECKS else False:
        return " | ".join(found[name])
    if re.fullmatch(r"(callback|logger)\.\w+", name):
        return "dict | null"
    return written_type(SETTINGS[name]) if name in SETTINGS else ""


def _of_config(model_type: str, name: str) -> tuple[str, str]:
    """Type and meaning of a key of the configuration of a model of transformers."""
    config = f"{CONFIG_MAPPING[model_type].__module__}.{CONFIG_MAPPING[model_type].__name__}"
    return parameter_type(config, name), parameter_meaning(config, name)


# What the code says of a parameter


@cache
def documentation(target: str) -> list[str]:
    """The docstrings of a class or function, of its constructor and of the classes that it is derived from."""
    found = get_object(target)
    kinds = [kind for kind in found.__mro__ if kind is not object] if isinstance(found, type) else [found]
    texts = [kind.__doc__ for kind in kinds] + [getattr(vars(kind).get("__init__"), "__doc__", "") for kind in kinds]
    return [inspect.cleandoc(text) for text in texts if text]


@cache
def parameter_meaning(target: str, name: str) -> str:
    """What a docstring says of a parameter: its entry under ``Args``, or the clause that has its name in backticks."""
    for text in documentation(target):
        entry = re.search(rf"^( *){name}(?: \(.*\))?:\s+(.*(?:\n\1 +\S.*)*)", text.partition("Args:")[2], re.MULTILINE)
        if entry:
            return _shortened(entry[2])
        for sentence in _sentences(text):
            clauses = [part for part in re.split(r"; |: (?=``)", sentence) if f"``{name}``" in part]
            if clauses:
                return _plain(re.sub(rf"^``{name}``: ", "", sentence if len(sentence) < 160 else clauses[0]))
    return ""


def _sentences(text: str) -> list[str]:
    prose = re.sub(r"\s*\n\s*(?!\n)", " ", re.split(r"^(?:>>>|Args:)", text, maxsplit=1, flags=re.MULTILINE)[0])
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z`])", prose.strip())


def _shortened(text: str) -> str:
    """The first sentences of an entry, without its default."""
    text = re.split(r"\s*(?:\.\. |Examples?:|\n\s*\n)", text)[0]
    text = re.sub(r"\s*Defaults?(?: to|:)\s*(?:``.*?``|`.*?`|\S+)\.?", "", " ".join(text.split()))
    parts = re.split(r"(?<=\.)\s+(?=[A-Z`])", text)
    return _plain(parts[0] if len(parts[0]) > 60 else " ".join(parts[:2]))


def _plain(text: str) -> str:
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    for python, written in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", written, text)
    return text.replace("``", "`").strip().removesuffix(".")


@cache
def parameter_type(target: str, name: str) -> str:
    """The choices of a parameter, or else its annotation."""
    if name in (found := choices(target)):
        return " | ".join(found[name])
    called = get_object(target)
    called = called.__init__ if isinstance(called, type) else called
    try:
        return written_type(get_type_hints(called).get(name, Any))
    except NameError:  # imported for type checkers only
        return written_type(called.__annotations__.get(name, Any))


@cache
def choices(target: str) -> dict[str, list[str]]:
    """The choices of parameters, by the calls of ``check_choice`` in a class or function and in what it is derived from."""
    found = get_object(target)
    kinds: list[Any] = list(found.__mro__) if isinstance(found, type) else [inspect.unwrap(found)]
    answer: dict[str, list[str]] = {}
    for kind in kinds:
        if not kind.__module__.startswith("tercet."):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_choice":
                name, _, accepted = node.args
                scope: dict[str, Any] = {**vars(inspect.getmodule(kind)), "self": found}
                if isinstance(name, ast.Constant) and not (isinstance(accepted, ast.Name) and accepted.id not in scope):
                    values = eval(compile(ast.Expression(accepted), kind.__module__, "eval"), scope)
                    answer.setdefault(name.value.rpartition(".")[2], list(map(str, values)))
    return answer


def written_type(hint: Any) -> str:
    """An annotation in the words of YAML: ``list[int] | null``; a literal by its values."""
    if hint is Any:
        return ""
    if hint is None or hint is type(None):
        return "null"
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(written for part in inside if (written := written_type(part))))
    if origin is Literal:
        return " | ".join(dict.fromkeys(str(value) for value in inside))
    if origin is Callable or (isinstance(origin, type) and origin.__name__ == "Callable"):
        return "Callable"
    kind = origin or hint
    if getattr(kind, "__name__", "") in ("Mapping", "dict"):
        return "dict"
    if getattr(kind, "__name__", "") in ("Sequence", "list", "tuple", "Iterable"):
        parts = list(dict.fromkeys(written_type(part) for part in inside if part is not ...))
        return f"list[{' | '.join(parts)}]" if any(parts) else "list"
    return "str" if hasattr(kind, "__fspath__") else getattr(kind, "__name__", str(kind))

"""What the documentation's site has beyond the pages of docs/: made at each build, so that nothing generated is committed.

MkDocs calls the functions ``on_*``; mkdocstrings reads docstrings through ``DoctestBlocks``.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import nbformat
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tercet.app.components import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
DOCS, CONF = ROOT / "docs", ROOT / "conf"
PACKAGES = ("losses", "models", "views", "data", "evaluation", "distributed", "training")
ABOVE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace ``folder/*`` in the navigation by the pages of the folder."""
    config.nav = _expand(config.nav, set())
    return config


def _expand(node: Any, named: set[str]) -> Any:
    if isinstance(node, dict):
        return {title: _expand(inner, named) for title, inner in node.items()}
    if not isinstance(node, list):
        return node
    named |= {item for item in node if isinstance(item, str)}
    found = []
    for item in node:
        if isinstance(item, str) and item.endswith("/*"):
            found += [path for path in sorted(_pages()) if path.startswith(item[:-1]) and path not in named]
        else:
            found.append(_expand(item, named))
    return found


@cache
def _pages() -> dict[str, str | None]:
    """The pages of the site by path, with the text of those that are made."""
    written = {path.relative_to(DOCS).as_posix(): None for path in DOCS.rglob("*.md")}
    made = {f"reference/api/{name}.md": api_page(name) for name in PACKAGES}
    made |= {f"reference/keys/{name}.md": text for name, text in key_pages()}
    made |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in (DOCS / "notebooks").glob("*.ipynb")}
    made |= {page: (ROOT / name).read_text(encoding="utf-8") for name, page in ABOVE.items()}
    return {**written, **made, "gallery.md": gallery_page()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, text in _pages().items():
        if text is not None:
            files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links that leave docs/, as GitHub follows them, links of the site; what it has no page for becomes plain text."""
    up = "../" * page.file.src_uri.count("/")
    above = "" if page.file.src_uri in ABOVE.values() else f"{up}../"
    for name, target in ABOVE.items():
        markdown = markdown.replace(f"]({above}{name}", f"]({up}{target}")
    markdown = markdown if above else markdown.replace("](docs/", "](")
    markdown = re.sub(r"(\]\([\w./]*notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:tests|src|conf|benchmarks)/[^)]*\)", r"\1", markdown)


# Python


def api_page(package: str) -> str:
    """What a package exports, by its docstrings."""
    found = _sources()[package]
    names = [str(name) for name in found.exports or []]
    head = f"# tercet.{package}\n\n{found.docstring.value if found.docstring else ''}\n"
    return "\n".join([head, *(f"::: tercet.{package}.{name}\n" for name in names)])


class DoctestBlocks(griffe.Extension):
    """Put the examples of docstrings in fences: Markdown takes ``>>>`` for a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one class, function or module."""
        if obj.docstring:
            blocks = re.compile(r"(?:^[ \t]*>>> .*\n?(?:^[ \t]*\S.*\n?)*\n?)+", re.MULTILINE)
            obj.docstring.value = blocks.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value)


# Configuration


@dataclass(frozen=True)
class Key:
    """One key of a configuration file: its default as written, the type it takes, and the comment beside it."""

    name: str
    default: str
    type: str
    meaning: str
    target: str = ""  # of a block that is a component


def key_pages() -> Iterator[tuple[str, str]]:
    """A page of each command's own keys, and of each group's choices."""
    for path in sorted(CONF.glob("*.yaml")):
        title = f"# `tercet {path.stem}`: keys\n\n{_code_header(path)}"
        yield f"1_{path.stem}", f"{title}\n\n{_table(read_keys(path).values())}\n\n{_groups(path)}\n"
    for folder in sorted(CONF.rglob("*/")):
        group, files = folder.relative_to(CONF).as_posix(), sorted(folder.glob("*.yaml"))
        if files and group not in ("base", "experiment"):
            parts = [f"# `{group}=`\n\nThe choices of this group, and the keys that each has."]
            if group == "evaluation":
                parts.append("Where the choice is given a name, as in `evaluation@test=sts`, keys begin with it: `test.path`.")
            for path in files:
                head = f"## `{group}={path.stem}`\n\n{_code_header(path)}"
                built = f"Builds {_link(_load(path)['_target_'])}.\n\n" if "_target_" in _load(path) else ""
                parts.append(f"{head}\n\n{built}{_table(read_keys(path, _package(path)).values())}")
            yield group.replace("/", "_"), "\n\n".join(parts) + "\n"


def _link(target: str) -> str:
    """The name of a component, with a link to its page where it has one."""
    package, _, name = target.removeprefix("tercet.").partition(".")
    documented = target.startswith("tercet.") and package in PACKAGES and name in map(str, _sources()[package].exports or [])
    return f"[`{target}`][{target}]" if documented else f"`{target}`"


def _package(path: Path) -> str:
    """What the keys of a choice begin with: the name of its group, unless the file says that they are written in full."""
    if path.read_text(encoding="utf-8").startswith("# @package _global_"):
        return ""
    return path.parent.relative_to(CONF).as_posix().replace("/", ".") + "."


def _groups(path: Path) -> str:
    chosen = [item for item in _load(path).get("defaults", []) if isinstance(item, dict)]
    rows = [(k, v) for item in chosen for k, v in item.items() if not k.startswith("override")]
    lines = [f"| [`{k}=`]({k.split('@')[0]}.md) | `{v}` |" for k, v in rows if (CONF / k.split("@")[0]).is_dir()]
    lines = [line.replace("(experiment.md)", "(../../gallery.md)") for line in lines]
    return "\n".join(["## Groups", "", "| group | default |", "| --- | --- |", *lines]) if lines else ""


def _load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def read_keys(path: Path, before: str = "") -> dict[str, Key]:
    """The keys of a file and of the files that it is built on, in their order; a later default stands, as does its comment."""
    own, found = _own_keys(path, before), dict[str, Key]()
    for item in [*_load(path).get("defaults", []), *(["_self_"] if "_self_" not in _load(path).get("defaults", []) else [])]:
        if item == "_self_":
            layer = own
        elif isinstance(item, str):
            name, _, package = item.partition("@")
            file = (CONF / name.strip("/") if name.startswith("/") else path.parent / name).with_suffix(".yaml")
            layer = read_keys(file, before if package in ("", "_here_", "_global_") else f"{before}{package}.")
        else:
            continue
        for name, key in layer.items():
            old = found.get(name, key)
            found[name] = replace(key, meaning=key.meaning or old.meaning, type=old.type or key.type)
    return found


def _own_keys(path: Path, before: str) -> dict[str, Key]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, Key] = {}

    def walk(node: yaml.MappingNode, prefix: str, kinds: dict[str, str]) -> None:
        values = {key.value: value for key, value in node.value}
        if "_target_" in values:
            kinds = parameter_types(values["_target_"].value)
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if key.value.startswith("_") or (prefix == before and key.value in ("defaults", "hydra")):
                continue
            inner = isinstance(value, yaml.MappingNode) and value.value and not value.flow_style
            end = key.end_mark if inner or not lines[value.end_mark.line : value.end_mark.line + 1] else value.end_mark
            end = key.end_mark if value.end_mark.line != key.end_mark.line else end
            comment = re.match(r"[^#]*?\s*#\s?(.*)", lines[end.line][end.column :])
            start, stop = value.start_mark, value.end_mark
            written = lines[start.line][start.column : stop.column] if start.line == stop.line else "…"
            kind = kinds.get(key.value) or setting_type(name) or _kind(value)
            target = next((v.value for k, v in value.value if k.value == "_target_"), "") if inner else ""
            about = comment[1] if comment else ""
            found[name] = Key(name, "" if inner else written or "null", "" if inner else kind, about, target)
            if inner:
                walk(value, f"{name}.", {})

    root = yaml.compose("\n".join(lines))
    if isinstance(root, yaml.MappingNode):
        walk(root, before, {})
    return found


def setting_type(name: str) -> str:
    """The type of a key that belongs to no component, as the command line checks it."""
    kind = SETTINGS.get(name)
    return "" if kind is None else kind.__name__ if isinstance(kind, type) else str(kind)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "list"
    if isinstance(node, yaml.MappingNode):
        return "dict"
    value = yaml.safe_load(node.value) if isinstance(node, yaml.ScalarNode) and node.style is None else ""
    return "" if value is None or str(node.value).startswith(("$", "?")) else type(value).__name__


@cache
def _sources() -> griffe.Object:
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"])
    found = loader.load("tercet")
    loader.resolve_aliases()
    return found  # type: ignore[return-value]


@cache
def parameter_types(target: str) -> dict[str, str]:
    """The annotations of the parameters of a class or function of Tercet, from its source; none for those of others."""
    if not target.startswith("tercet."):
        return {}
    found = _sources()[target.removeprefix("tercet.")]
    return {p.name: str(p.annotation) for p in found.parameters if p.annotation is not None}


def _cell(text: str, code: bool = False) -> str:
    text = (
        html.escape(text, quote=False).replace("|", "&#124;").replace("[", "&#91;").replace("*", "&#42;").replace("_", "&#95;")
    )
    return f"<code>{text}</code>" if code and text else text


def _meaning(key: Key) -> str:
    return "; ".join(part for part in (_cell(key.meaning), key.target and f"a {_link(key.target)}") if part)


def _table(keys: Any) -> str:
    rows = [
        f"| {_cell(k.name, True)} | {_cell(k.type, True)} | {_cell(k.default, True)} | {_meaning(k)} |" for k in keys
    ]  # fmt: skip
    return (
        "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]) if rows else "No keys of its own."
    )


def _header(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.lstrip("# ") for line in lines[:end] if not line.startswith("# @package")]


def _code_header(path: Path) -> str:
    """The comment at the head of a file: its commands as a block, the rest as text."""
    lines = _header(path)
    commands = [line for line in lines if re.match(r"(python train|tercet |evaluation=|model=)", line)]
    text = " ".join(line for line in lines if line not in commands)
    block = "\n".join(["```bash", *commands, "```"]) if commands else ""
    return "\n\n".join(part for part in (block, _cell(text)) if part)


# The gallery


def gallery_page() -> str:
    """Every experiment: how to start it, what it is built of, the figures of its page in the lab, and what is expected."""
    parts = [
        "# Gallery of experiments",
        "Each is a file of `conf/experiment/`; the figures are of the [lab](lab/README.md)'s runs.",
    ]
    for path in sorted(CONF.glob("experiment/*.yaml"), key=lambda path: (path.stem != "quickstart", path.stem)):
        chosen = [item for item in _load(path).get("defaults", []) if isinstance(item, dict)]
        built = [f"`{k.removeprefix('override ').strip('/')}={v}`" for item in chosen for k, v in item.items()]
        text = _code_header(path)
        pages = [name for name in re.findall(r"docs/(lab/\w+\.md)", path.read_text(encoding="utf-8")) if (DOCS / name).exists()]
        images = [
            f"lab/{image}" for page in pages for image in re.findall(r"!\[.*?\]\((\w+\.png)\)", (DOCS / page).read_text())
        ]
        images += [f"lab/{path.stem}.png"] if (DOCS / "lab" / f"{path.stem}.png").exists() else []
        text = re.sub(r"docs/(lab/\w+\.md)", r"[\1](\1)", text.replace("&#95;", "_"))
        shown = [f"![{path.stem}]({image})" for image in dict.fromkeys(images)]
        parts += [f"## {path.stem}", text, f"Built of {', '.join(built)}." if built else "", *shown, _expected(path)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _expected(path: Path) -> str:
    rows = [
        f"| {_cell(metric, True)} | {mean}{f' ± {sd}' if sd else ''} | {_cell(str(source))} |"
        for metric, values in _load(path).get("expected", {}).items()
        for mean, sd, _, source in values
    ]
    return "\n".join(["| measured | value | of |", "| --- | --- | --- |", *rows]) if rows else ""


# Notebooks


def notebook_page(path: Path) -> str:
    """A notebook as a page: its texts, code and the outputs that are stored in it."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f'<img alt="" src="data:image/png;base64,{data["image/png"].strip()}">')
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"

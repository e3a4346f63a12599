"""What the documentation's site has beyond the pages of docs/: made at each build, so that nothing generated is committed.

MkDocs calls the functions ``on_*``; mkdocstrings reads docstrings through ``DoctestBlocks``.
"""

import html
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import griffe
import nbformat
from config_keys import CONF, Key, documentation, header, layers, load, package, read_keys
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = CONF.parent
DOCS = ROOT / "docs"
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
    if 'class="beside"' in markdown:  # two columns need the room of the menus
        page.meta["hide"] = ["navigation", "toc"]
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


@cache
def _sources() -> griffe.Object:
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"])
    found = loader.load("tercet")
    loader.resolve_aliases()
    return found  # type: ignore[return-value]


class DoctestBlocks(griffe.Extension):
    """Put the examples of docstrings in fences: Markdown takes ``>>>`` for a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one class, function or module."""
        if obj.docstring:
            blocks = re.compile(r"(?:^[ \t]*>>> .*\n?(?:^[ \t]*\S.*\n?)*\n?)+", re.MULTILINE)
            obj.docstring.value = blocks.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value)


# Configuration


@dataclass
class Section:
    """A part of a page of keys: what is above the table, its rows, and of keys with the same keys inside as others: which."""

    head: str
    rows: list[Key]
    same: dict[str, str] = field(default_factory=dict)


def key_pages() -> Iterator[tuple[str, str]]:
    """A page of each command's own keys, and of each group's choices."""
    for page, sections in key_sections().items():
        first: dict[str, Key] = {}  # the rows that links lead to
        for key in (key for section in sections for key in section.rows):
            first.setdefault(key.name, key)
        yield page, "\n\n".join(part for section in sections for part in (section.head, _table(section, page, first)) if part)


@cache
def key_sections() -> dict[str, list[Section]]:
    """The pages of each command's own keys and of each group's choices, by name, before they are written out."""
    pages = {}
    for path in sorted(CONF.glob("*.yaml")):
        title = f"# `tercet {path.stem}`: keys\n\n{_code_header(path)}"
        pages[f"1_{path.stem}"] = [Section(title, list(read_keys(path).values())), Section(_groups(path), [])]
    for folder in sorted(CONF.rglob("*/")):
        group, files = folder.relative_to(CONF).as_posix(), sorted(folder.glob("*.yaml"))
        if files and group not in ("base", "experiment"):
            pages[group.replace("/", "_")] = _group_sections(group, files)
    return pages


def _group_sections(group: str, files: list[Path]) -> list[Section]:
    """A part for each file of conf/base/ that several choices are built on, then one for each choice, with what differs."""
    prefix = group.replace("/", ".") + "."
    text = f"# `{group}=`\n\nThe choices of this group, and the keys that each has."
    if group == "evaluation":
        text += " Where the choice is given a name, as in `evaluation@test=sts`, keys begin with it: `test.path`."
    files = sorted(files, key=lambda path: len({*_bases(path, package(path), prefix)} & {*files}))  # bases come first
    starts = {path: package(path) for path in files}
    uses = Counter(base for path in files for base in _bases(path, starts[path], prefix))
    common = sorted((base for base in uses if uses[base] > 1 and base not in starts), key=lambda base: -uses[base])
    starts = {**dict.fromkeys(common, prefix), **starts}
    names = {
        path: f"`{group}={path.stem}`" if path in files else f"Common keys: {path.stem.replace('_', ' ')}" for path in starts
    }
    sections, shown = [Section(text, [])], dict[Path, str]()
    for path, before in starts.items():
        bases = [base for base in _bases(path, before, prefix) if base in starts]
        known = {name: key for base in bases for name, key in read_keys(base, starts[base]).items()}
        same = _mounted(path, before, prefix, starts, shown, known)
        rows = [key for name, key in read_keys(path, before).items() if not _says_the_same(key, known.get(name))]
        links = ", ".join(f"[{names[base].split(': ')[-1]}](#{base.parent.name}-{base.stem})" for base in bases)
        target = str(load(path).get("_target_", ""))
        parts = [
            f"## {names[path]} {{#{path.parent.name}-{path.stem}}}",
            _code_header(path),
            f"Builds {_link(target)}." if target else "",
            f"The keys of {links}{', with these differences:' if rows else '.'}" if links else "",
            "" if rows or links else "No keys of its own.",
        ]
        sections.append(Section("\n\n".join(filter(None, parts)), rows, same))
    return sections


def _says_the_same(key: Key, other: Key | None) -> bool:
    return other is not None and replace(key, type="") == replace(other, type="")


def _bases(path: Path, before: str, prefix: str) -> list[Path]:
    """The files that a file is built on, their keys beginning as those of the group, the most general first."""
    direct = [file for file, place in layers(path, before) if place == prefix and file != path]
    return list(dict.fromkeys(base for file in direct for base in (*_bases(file, prefix, prefix), file)))


def _mounted(
    path: Path, before: str, prefix: str, starts: Collection[Path], shown: dict[Path, str], known: dict[str, Key]
) -> dict[str, str]:
    """Of the keys that hold a whole file: those whose file is ``shown`` already, with the key where it is.

    What such a file says itself is added to the keys that are ``known``, so that only differences are shown.
    """
    same: dict[str, str] = {}
    for file, place in layers(path, before):
        if file == path or (place == prefix and file in starts):
            continue
        if place != prefix and shown.setdefault(file, place) != place:
            known |= read_keys(file, place)
            same[place[:-1]] = shown[file][:-1]
        else:
            same |= _mounted(file, place, prefix, starts, shown, known)
    return same


def _link(target: str) -> str:
    """The name of a component, with a link to its page where it has one."""
    folder, _, name = target.removeprefix("tercet.").partition(".")
    documented = target.startswith("tercet.") and folder in PACKAGES and name in map(str, _sources()[folder].exports or [])
    return f"[`{target}`][{target}]" if documented else f"`{target}`"


@cache
def _places() -> dict[str, str]:
    """The page that documents a key, where it is not the page itself: that of its group, else of the first command."""
    places = {key.name: page for page, sections in key_sections().items() for part in sections for key in part.rows}
    for page, sections in key_sections().items():
        mine = {key.name: page for section in sections for key in section.rows}
        places |= {name: page for name in mine if page == "1_train" or name.split(".")[0] == page}
    return {**places, **{page: page for page in key_sections() if (CONF / page).is_dir()}}


def _key_link(name: str, page: str, names: Collection[str]) -> str:
    """A key with a link to its row."""
    code = _cell(name, code=True)
    if name in names:
        return f"[{code}](#{name})"
    place = _places().get(name, "")
    return f"[{code}]({place}.md{'' if place == name else f'#{name}'})" if place and place != page else code


def _groups(path: Path) -> str:
    chosen = [item for item in load(path).get("defaults", []) if isinstance(item, dict)]
    rows = [(k, v) for item in chosen for k, v in item.items() if not k.startswith("override")]
    lines = [f"| [`{k}=`]({k.split('@')[0]}.md) | `{v}` |" for k, v in rows if (CONF / k.split("@")[0]).is_dir()]
    lines = [line.replace("(experiment.md)", "(../../gallery.md)") for line in lines]
    return "\n".join(["## Groups", "", "| group | default |", "| --- | --- |", *lines]) if lines else ""


def _cell(text: str, code: bool = False) -> str:
    text = html.escape(text, quote=False)
    for character in "|[{*_`":
        text = text.replace(character, f"&#{ord(character)};")
    return f"<code>{text}</code>" if code and text else text


def _prose(text: str, page: str = "", names: Collection[str] = (), follows: str = "") -> str:
    """A text with code in backticks; in that of a ``page`` full names of keys become links."""
    parts = text.split("`")
    code = [_key_link(x, page, names) if page and ("." in x or x == follows) else _cell(x, code=True) for x in parts[1::2]]
    return "".join(f"{_cell(plain)}{inner}" for plain, inner in zip_longest(parts[::2], code, fillvalue=""))


def _table(section: Section, page: str, first: dict[str, Key]) -> str:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"] if section.rows else []
    for key in section.rows:
        name = _cell(key.name, code=True)
        if first[key.name] is key:
            name = name.replace("<code>", f'<code id="{key.name}">')
        default = re.sub(r"(?<=[\w}][./])(?=\w)", "<wbr>", _cell(key.default, code=True))
        about = _prose(key.meaning, page, first, key.follows) + (f" ({_link(key.target)})" if key.target else "")
        if other := section.same.get(key.name):
            about += f"; it has the keys of {_key_link(other, page, first)}; those below differ"
        lines.append(f"| {name} | {_cell(key.type, code=True)} | {default} | {about} |")
    return "\n".join(lines)


def _code_header(path: Path) -> str:
    """The comment at the head of a file: its commands, which may go on in indented lines, as a block; the rest as text."""
    commands, text = list[str](), list[str]()
    for line in header(path):
        if not re.match(r"(python train|tercet |evaluation=|model=|  )", line):
            text.append(line)
        elif line.startswith("  ") and commands and not commands[-1].endswith("\\"):
            commands[-1:] = [f"{commands[-1]} \\", line]
        else:
            commands.append(line)
    block = "\n".join(["```bash", *commands, "```"]) if commands else ""
    return "\n\n".join(part for part in (block, _prose(" ".join(text))) if part)


# The gallery


def gallery_page() -> str:
    """Every experiment: how to start it, its paper, what it is built of, its figures in the lab, and what is expected."""
    parts = [
        "# Gallery of experiments",
        "Each is a file of `conf/experiment/`; the figures are of the [lab](lab/README.md)'s runs.",
    ]
    for path in sorted(CONF.glob("experiment/*.yaml"), key=lambda path: (path.stem != "quickstart", path.stem)):
        chosen = [item for item in load(path).get("defaults", []) if item != "_self_"]
        built = [f"[`experiment={item}`](#{item})" for item in chosen if isinstance(item, str)]
        built += [f"`{k.split()[-1].strip('/')}={v}`" for item in chosen if isinstance(item, dict) for k, v in item.items()]
        text = re.sub(r"docs/(lab/\w+\.md)", r"[\1](\1)", _code_header(path).replace("&#95;", "_"))
        parts += [f"## {path.stem}", text, _paper(path), f"Built of {', '.join(built)}." if built else ""]
        parts += [*(f"![{path.stem}]({image})" for image in _figures(path)), _expected(path)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figures(path: Path) -> list[str]:
    """The figures of an experiment: its own, and those of the page that it names, below a command that starts it."""
    found = [f"lab/{path.stem}.png"] if (DOCS / "lab" / f"{path.stem}.png").exists() else []
    for page in re.findall(r"docs/(lab/\w+\.md)", path.read_text(encoding="utf-8")):
        for part in re.split(r"^(?=## )", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
            images = re.finditer(r"!\[.*?\]\((\w+\.png)\)", part)
            found += [f"lab/{image[1]}" for image in images if re.search(rf"experiment={path.stem}\b", part[: image.start()])]
    return list(dict.fromkeys(found))


def _paper(path: Path) -> str:
    """The paper of an experiment's objective, which the docstring of that names."""
    node = load(CONF / "objective" / f"{_objective(path) or _objective(CONF / 'train.yaml')}.yaml")
    about = documentation(node.get("_target_") or node["objective"]["_target_"])[0]
    found = re.search(r"\(([^()]*arXiv:([\d.]+\d))", about)
    return f"Paper: [{found[1]}](https://arxiv.org/abs/{found[2]})." if found else ""


def _objective(path: Path) -> str:
    """The objective that a file chooses, or an experiment that it is built on; "" is that of conf/train.yaml."""
    for item in load(path).get("defaults", []):
        found = item.get("override /objective") or item.get("objective") if isinstance(item, dict) else None
        base = path.parent / f"{item}.yaml"
        if isinstance(item, str) and path.parent.name == "experiment" and base.exists():
            found = _objective(base)
        if found:
            return str(found)
    return ""


def _expected(path: Path) -> str:
    rows = [
        f"| {_cell(metric, True)} | {mean}{f' ± {sd}' if sd else ''} | {_cell(str(source))} |"
        for metric, values in load(path).get("expected", {}).items()
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

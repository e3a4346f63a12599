"""The commands, keys, Python and links of the documentation exist."""

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tercet.app.cli import COMMANDS, config_folder

ROOT = Path(__file__).resolve().parents[1]
CONF = Path(config_folder())
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SAVED = re.compile(r"(?:`|^```yaml\n# )(my_conf/[\w/]+\.yaml)(?:`[^`]*```yaml)?\n(.*?)```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`\+?([a-z_]+(?:@[a-z_.]+)?(?:\.[a-z_0-9]+)*)=")


def blocks(page, language):
    """The fenced code blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def is_composed(name):
    """Whether this is a command with keys; ``doctor`` and a few others have options alone."""
    return name in COMMANDS and (CONF / f"{name}.yaml").is_file()


def commands(page):
    """Each command of the page that Hydra composes, as (entry, words)."""
    for block in blocks(page, "bash"):
        text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", block, flags=re.DOTALL).replace("\\\n", " ")
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if "train.py" in words:
                yield "train", words[words.index("train.py") + 1 :]
            elif "tercet" in words[:-1] and is_composed(words[words.index("tercet") + 1]):
                yield words[words.index("tercet") + 1], words[words.index("tercet") + 2 :]


def one_value(override):
    """The first value of a sweep over several."""
    key, _, value = override.partition("=")
    if re.match(r"(tag|interval|choice|range)\(", value):
        return f"{key}=1"
    return override if value.startswith(("[", "{", "'", '"')) else f"{key}={value.split(',')[0]}"


def overrides(entry, words):
    """What the command line makes of the words: see ``tercet.app.cli``."""
    words = [word for word in words if "=" in word and not word.startswith("--")]
    if entry == "train":
        return [one_value(word) for word in words]
    return [re.sub(r"^model=([^\[].*)", r"model.path='\1'", re.sub(r"^model=\[", "model.path=[", word)) for word in words]


def cases():
    """Each command once; the pages of measurements are checked by the slow tests."""
    seen = set()
    for page in PAGES:
        marks = [pytest.mark.slow] if page.parent.name == "lab" else []
        for number, (entry, words) in enumerate(commands(page)):
            if (entry, *words) not in seen:
                yield pytest.param(page, entry, words, id=f"{page.relative_to(ROOT)}-{number}", marks=marks)
            seen.add((entry, *words))


CASES = list(cases())


def test_the_pages_have_commands():
    assert len(CASES) > 100


@pytest.mark.parametrize(("page", "entry", "words"), CASES)
def test_commands_compose(page, entry, words, tmp_path):
    given = overrides(entry, words)
    launchers = {"hydra/launcher=joblib": "joblib_launcher", "hydra/launcher=submitit_slurm": "hydra_submitit_launcher"}
    for word, package in launchers.items():
        if word in given:
            pytest.importorskip(f"hydra_plugins.hydra_{package}" if package[0] == "j" else f"hydra_plugins.{package}")
    for path, content in SAVED.findall(page.read_text()):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        given = [f"hydra.searchpath=[file://{tmp_path / 'my_conf'}]", *given] if "--config-dir=my_conf" in words else given
    OmegaConf.register_new_resolver("run_id", lambda: "test", replace=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(entry, given)


def keys_of(node):
    """All names of a configuration file."""
    if isinstance(node, dict):
        return {str(key).split("@")[0] for key in node}.union(*map(keys_of, node.values()))
    return set().union(*map(keys_of, node)) if isinstance(node, list) else set()


@cache
def known_names():
    files = list(CONF.rglob("*.yaml"))
    names = set().union(*(keys_of(OmegaConf.to_container(OmegaConf.load(path), resolve=False)) for path in files))
    groups = {part for path in files for part in path.parent.relative_to(CONF).parts}
    return names | groups | {"test", "validation", "layout", "dropout", "recompute", "chunk_tokens", "chunk_rows"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_in_the_text_exist(page):
    if page.name in ("library.md", "extend.md"):  # their names are arguments of Python, too
        return
    known = known_names()
    for key in INLINE.findall(page.read_text()):
        if "`" in key or key.split(".")[0].split("@")[0] in ("pip", "precision"):
            continue
        names = [name for part in re.split(r"[.@]", key) for name in [part] if not name.isdigit()]
        assert set(names) <= known, f"{key}: {sorted(set(names) - known)} in no file of conf/"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_parse_and_their_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tercet":
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                owner = node.value
                if isinstance(owner.value, ast.Name) and owner.value.id == "tercet":  # tercet.losses.InfoNCE
                    assert hasattr(importlib.import_module(f"tercet.{owner.attr}"), node.attr), (
                        f"tercet.{owner.attr}.{node.attr}"
                    )


def anchors(page):
    """GitHub's anchors of the page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_their_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_is_short_and_starts_with_installing_and_training():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 130
    head = "\n".join(text.splitlines()[:16])
    assert "pip install" in head and "tercet train" in head and "make train" in head


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_prose_is_american_and_has_no_old_names(page):
    if page.name in ("CHANGELOG.md", "extend.md", "architecture.md"):
        return
    text = page.read_text().replace("labelled_text.parquet", "").replace("sentences_unlabelled.parquet", "")
    british = r"\w*neighbour\w*|labelled|unlabelled|colour\w*|normalis\w+|grey|behaviour\w*|optimis\w+"
    old = rf"\b({british}|keyed|start_from|evaluation=geometry)\b"
    assert not re.findall(old, text)


def test_every_extra_is_explained_with_what_it_installs():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", (ROOT / "docs/howto/command_line.md").read_text(), re.MULTILINE)
    for name, packages, meaning in rows:
        found = [re.match(r"tercet\[.*\]|[\w.-]+", line)[0] for line in extras.pop(name)]
        assert packages == ", ".join(found), name
        assert len(meaning) > 10
    assert set(extras) <= {"dev"}

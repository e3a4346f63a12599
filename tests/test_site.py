"""The site of the documentation: its links, its reference of keys, the notebooks, and the code of the migration pages."""

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import yaml

from tests.conftest import CONF, choices

ROOT = CONF.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MIGRATIONS = sorted((ROOT / "docs" / "migrate").glob("*.md"))


@pytest.fixture(scope="module")
def generated():
    """The module that makes pages at each build."""
    pytest.importorskip("mkdocstrings")
    spec = spec_from_file_location("generated_pages", ROOT / "docs" / "generated.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", MIGRATIONS, ids=lambda page: page.stem)
def test_the_code_of_a_migration_page_runs(page):
    torch.manual_seed(0)
    values = {"embeddings": torch.randn(32, 16, requires_grad=True), "labels": torch.arange(32) % 8}
    values["first"], values["second"] = torch.randn(2, 8, 16, requires_grad=True)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ours = [block for block in blocks if "import tercet" in block or "tercet." in block]
    assert ours
    values["tercet"] = __import__("tercet")
    for block in ours:
        exec(block, values)


def test_values_equal_those_of_pytorch_metric_learning():
    pytest.importorskip("pytorch_metric_learning")
    page = ROOT / "docs" / "migrate" / "pytorch_metric_learning.md"
    torch.manual_seed(0)
    values, found = {}, []
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(block, values)
        found.append((values["value"].item(), values["by_label"].item() if "by_label" in values else None))
    (triplets, ours), (theirs, our_other) = (found[:2], found[2:])
    assert triplets[0] == pytest.approx(ours[0], rel=1e-5)
    assert theirs == pytest.approx(our_other, rel=1e-5)


def test_every_key_of_the_configuration_is_on_a_page_with_its_type_and_meaning(generated):
    pages = dict(generated.key_pages())
    for path in CONF.rglob("*.yaml"):
        if path.parent.name in ("base", "experiment"):
            continue
        page = pages[f"1_{path.stem}" if path.parent == CONF else path.parent.relative_to(CONF).as_posix().replace("/", "_")]
        names = {name for name in yaml.safe_load(path.read_text()) or {} if not name.startswith("_")}
        for name in names - {"defaults", "hydra"}:
            assert re.search(rf"<code>([a-z.]+\.)?{re.escape(generated._cell(name))}[.<]", page), (path, name)


@pytest.mark.parametrize(
    ("file", "key", "kind", "default", "meaning"),
    [
        ("loss/infonce", "loss.similarity", "str", "cosine", "or dot"),
        ("loss/triplet", "loss.tile", "int | None", "null", "anchor rows at a time; null chooses"),
        ("train", "seed", "int", "1", ""),
        ("train", "stages.runs", "dict", "{}", "name -> what is set in it; null leaves a stage out"),
        ("data/text", "data.workers", "int", "0", ""),  # of a base file of a base file
        ("data/text", "data.max_length", "int", "48", "tokens of a training row"),  # changed, with the comment of the base
        (
            "model/minilm",
            "model.execution.chunk_tokens",
            "int | Literal['auto'] | None",
            "1024",
            None,
        ),  # of a block that is a component
        ("objective/simcse_sup", "objective.memory.size", "int", "0", "examples; 0 is none"),
    ],
)
def test_keys(generated, file, key, kind, default, meaning):
    path = CONF / f"{file}.yaml"
    found = generated.read_keys(path, "" if path.parent == CONF else generated._package(path))[key]
    assert (found.type, found.default) == (kind, default)
    assert meaning in (None, found.meaning)


def test_the_gallery_has_every_experiment(generated):
    page = generated.gallery_page()
    assert all(f"\n## {name}\n" in page for name in choices("experiment"))
    assert "![facenet_lfw_small](lab/facenet_roc.png)" in page


def test_examples_of_docstrings_become_blocks(generated):
    griffe = pytest.importorskip("griffe")
    thing = griffe.Function("f")
    thing.docstring = griffe.Docstring("Add.\n\n>>> f(1)\n2\n>>> f(\n...     2)\n3\n\nMore.")
    generated.DoctestBlocks().on_object(obj=thing)
    assert thing.docstring.value == "Add.\n\n```pycon\n>>> f(1)\n2\n>>> f(\n...     2)\n3\n```\nMore."


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_its_outputs_and_no_path_of_a_machine(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells) and any(cell.outputs for cell in cells)
    assert not re.search(r"/(home|root|tmp|work|usr|var)/|[A-Z]:\\\\", path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "exit code 1" not in str(notebook)


@pytest.mark.slow
def test_the_site_is_built_without_a_broken_link_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    blocked = tmp_path / "sitecustomize.py"  # no network: a connection is an error
    refuse = "def refuse(*_, **__):\n    raise OSError('no network')\n"
    blocked.write_text(f"import socket\n\n{refuse}\nsocket.socket.connect = refuse\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        assert not re.search(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="https?:', page.read_text()), page

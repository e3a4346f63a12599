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
    sys.path.insert(0, str(ROOT / "docs"))  # as MkDocs does while it loads a hook
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
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
            assert re.search(rf">([a-z.]+\.)?{re.escape(generated._cell(name))}[.<]", page), (path, name)


def test_no_key_is_without_a_type_and_a_meaning(generated):
    pages = generated.key_sections()
    rows = [(page, key) for page, sections in pages.items() for section in sections for key in section.rows]
    assert len(rows) > 900
    assert not [(page, key.name) for page, key in rows if not key.type]
    says = {(page, key.name): key.meaning.strip(" .`").lower() for page, key in rows}
    assert not {place: text for place, text in says.items() if len(text.split()) < 3 or text == place[1].split(".")[-1]}


def test_a_page_has_each_key_of_a_choice_in_its_own_part_or_in_one_that_is_named_there(generated):
    sections = {section.head.splitlines()[0]: section for section in generated.key_sections()["data"]}
    books, files = sections["## `data=books` {#data-books}"], sections["## Common keys: text files {#base-text_files}"]
    names = [key.name for key in books.rows]
    assert "[text files](#base-text_files)" in books.head
    assert "data.train.held_out_by" in names and "data.train.streaming" not in names
    assert "data.train.streaming" in [key.name for key in files.rows]
    assert books.same == {"data.validation": "data.train"} and "data.validation.split" in names


def test_links_of_a_key_lead_to_its_row(generated):
    pages = dict(generated.key_pages())
    assert '<code id="data.path">data.path</code>' in pages["data"]
    assert "the value of [<code>data.test</code>](data.md#data.test)" in pages["evaluation"]
    assert "the value of [<code>loss</code>](loss.md)" in pages["objective"]


@pytest.mark.parametrize(
    ("file", "key", "kind", "default", "meaning"),
    [
        ("loss/infonce", "loss.similarity", "cosine | dot", "cosine", "or dot: how an anchor and a key are compared"),
        ("loss/triplet", "loss.tile", "int | null", "null", "anchor rows at a time; null chooses"),
        ("train", "seed", "int", "1", None),
        ("train", "stages.runs", "dict", "{}", "name -> what is set in it; null leaves a stage out"),
        ("data/text", "data.workers", "int", "0", None),  # of a base file of a base file
        ("data/text", "data.module.batch_size", "int", "${data.batch_size}", "the value of `data.batch_size`"),
        ("data/text", "data.columns", "list[str]", "[]", None),  # of the parameters that are given its value
        (
            "data/images",
            "data.transform.augment.jpeg",
            "float",
            "0.0",
            "the probability of JPEG compression of quality 10 to 90",
        ),
        ("model/towers", "model.f.backbone.cell", "gru | lstm | bag", "gru", None),  # of a choice of the same group
        ("model/bert_small", "model.backbone.config.hidden_size", "int", "256", "Dimension of the hidden representations"),
        ("callback/default", "callback.summary.max_depth", "int", "2", None),  # of Lightning
        ("logger/csv", "logger.csv.prefix", "str", '""', "A string to put at the beginning of metric keys"),  # of a base class
        ("sweep/seeds", "hydra.sweeper.params.seed", "str", "1,2,3", "the values of `seed` that are tried"),
        ("view/crop", "view.second.0.rate", "float", "0.1", None),  # in a list
        ("encode", "precision", "float32 | float16 | int8 | binary", "float32", None),
        ("data/text", "data.max_length", "int", "48", "tokens of a training row"),  # changed, with the comment of the base
        ("model/minilm", "model.execution.chunk_tokens", "int | auto | null", "auto", None),  # of a block that is a component
        ("objective/simcse_sup", "objective.memory.size", "int", "0", "examples; 0 is none"),
    ],
)
def test_keys(generated, file, key, kind, default, meaning):
    path = CONF / f"{file}.yaml"
    found = generated.read_keys(path, "" if path.parent == CONF else generated.package(path))[key]
    assert (found.type, found.default) == (kind, default)
    assert meaning in (None, found.meaning)


def test_the_gallery_has_every_experiment(generated):
    page = generated.gallery_page()
    assert all(f"\n## {name}\n" in page for name in choices("experiment"))
    parts = {part.split("\n")[0]: part for part in page.split("\n## ")}
    assert "![facenet_lfw_small](lab/facenet_roc.png)" in parts["facenet_lfw_small"]
    assert "![" not in parts["facenet_questions"]  # of the same page of the lab, which has no figure of it
    assert "[experiment=" not in page and "(https://arxiv.org/abs/1803.02893)" in parts["quick_thoughts"]
    assert all("```bash\n" in part for name, part in parts.items() if not name.startswith("#"))
    papers = [name for name, part in parts.items() if "Paper: [" in part]
    assert set(choices("experiment")) - {"own_texts"} <= {*papers}


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

"""``tercet.load``: runs, checkpoints, model folders, and what cannot be opened."""

import json

import pytest
import torch

from tercet.errors import InputError
from tercet.models import load, load_backbone, load_tokenizer, save_model
from tercet.models.folder import KEY, SETTINGS, VERSION, encoder_spec
from tests.conftest import CONF, MINILM, TEXTS


def write_checkpoint(encoder, path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"encoder.{name}": x for name, x in encoder.state_dict().items()}
    torch.save({"state_dict": state, KEY: {**encoder_spec(encoder), **changes}}, path)


def test_a_run_is_its_model_folder_or_its_newest_checkpoint(encoder, tmp_path):
    run = tmp_path / "run"
    write_checkpoint(encoder, run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text("")
    want = encoder.encode(TEXTS)
    assert torch.equal(load(run).encode(TEXTS), want)
    assert torch.equal(load(run / "checkpoints" / "last.ckpt").encode(TEXTS), want)
    save_model(encoder, run / "model")
    opened = load(run)
    assert torch.equal(opened.encode(TEXTS), want) and not opened.training
    assert load(run, pooling="mean").pooling == "mean"


def test_files_without_a_version_are_read_and_later_ones_are_refused(encoder, tmp_path):
    save_model(encoder, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / SETTINGS).read_text())
    assert settings.pop("version") == VERSION
    (tmp_path / "model" / SETTINGS).write_text(json.dumps(settings))
    assert torch.equal(load(tmp_path / "model").encode(TEXTS), encoder.encode(TEXTS))
    (tmp_path / "model" / SETTINGS).write_text(json.dumps({**settings, "version": 99}))
    write_checkpoint(encoder, tmp_path / "x.ckpt", version=99)
    for name in ("model", "x.ckpt"):
        with pytest.raises(InputError, match=f"{name} was written by a later version of tercet"):
            load(tmp_path / name)


def test_what_cannot_be_opened_is_explained(encoder, tmp_path):
    write_checkpoint(encoder, tmp_path / "a.ckpt", tokenizer={"tokenizer.json": "{}"})
    write_checkpoint(encoder, tmp_path / "b.ckpt")
    for folder, files in (("stopped", ["config.yaml"]), ("failed", ["config.yaml", "metrics.json"])):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("")
    for name, options, message in [
        ("a.ckpt", {}, "a.ckpt holds an encoder that cannot be built here"),
        ("b.ckpt", {"pooling": "cls"}, "pooling=cls: a checkpoint records its own pooling"),
        ("c.ckpt", {}, "path_or_id=.*c.ckpt: there is no such file"),
        ("stopped", {}, "path_or_id=.*stopped is a run without a model or a checkpoint"),
        ("failed", {}, "path_or_id=.*failed is a run without a model: it did not finish"),
        ("nothing", {}, "path_or_id=.*nothing: there is no such run or folder; .* holds failed, stopped"),
    ]:
        with pytest.raises(InputError, match=message):
            load(tmp_path / name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing_is_named():
    with pytest.raises(InputError, match="device=cuda, but torch sees 0 GPUs"):
        load(MINILM, device="cuda")


NAMES = [
    "../x.txt",
    "{away}",
    "inner/x.txt",
    "..",
    "..\\x.txt",
    "C:x.txt",
    "a\0b.txt",
    ".hidden",
    "config.json",
    "adapter_config.json",
]


def test_a_checkpoint_writes_files_of_a_tokenizer_only(encoder, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary" / "inner"))
    (tmp_path / "temporary" / "inner").mkdir()
    write_checkpoint(encoder, tmp_path / "whole.ckpt")
    files = torch.load(tmp_path / "whole.ckpt", weights_only=True)[KEY]["tokenizer"]
    for name in NAMES:
        name = name.format(away=tmp_path / "away.txt")
        write_checkpoint(encoder, tmp_path / "x.ckpt", tokenizer={**files, name: "x"})
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match=r"x.ckpt: its tokenizer names files that are not a tokenizer's") as caught:
            load(tmp_path / "x.ckpt")
        assert repr(name) in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before, name
    assert torch.equal(load(tmp_path / "whole.ckpt").encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize(
    ("key", "value"), [("tokenizer", 7), ("tokenizer", {"vocab.txt": 7}), ("config", None), ("version", "x")]
)
def test_a_checkpoint_of_other_types_is_explained(encoder, tmp_path, key, value):
    write_checkpoint(encoder, tmp_path / "x.ckpt", **{key: value})
    with pytest.raises(InputError, match=r"x.ckpt holds an encoder that cannot be built here"):
        load(tmp_path / "x.ckpt")


@pytest.fixture
def folder(encoder, tmp_path, monkeypatch):
    """A model folder, and a file of Python in it that says when it is run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_model(encoder, tmp_path / "model")
    (tmp_path / "model" / "mine.py").write_text("print('this was run')")
    return tmp_path / "model"


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}),
        ("config.json", {"auto_map": {"AutoModel": "mine.Model"}}),  # transformers would take its own BERT silently
        ("config.json", {"attn_implementation": "someone/kernel"}),
        ("config.json", {"text_config": {"attn_implementation": "someone/kernel:attend"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}),
    ],
)
def test_code_in_a_folder_is_not_run(folder, capsys, file, values):
    change(folder / file, **values)
    with pytest.raises(InputError, match=rf"path_or_id=.*its {file} names Python code.*trust_remote_code=true runs it"):
        load(folder)
    for read in (load_backbone, load_tokenizer):
        with pytest.raises(InputError, match=rf"name=.*its {file} names Python code"):
            read(str(folder))
    assert "this was run" not in capsys.readouterr().out


def test_code_in_a_folder_is_run_where_that_is_wanted(folder, capsys):
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    with pytest.raises(InputError, match=r"could not be read as a model"):  # there is no class in the file
        load(folder, trust_remote_code=True)
    assert "this was run" in capsys.readouterr().out


def test_code_that_a_checkpoint_names_is_not_run(encoder, tmp_path):
    config = {**json.loads(encoder_spec(encoder)["config"]), "auto_map": {"AutoModel": "someone/model--mine.Model"}}
    write_checkpoint(encoder, tmp_path / "x.ckpt", config=json.dumps(config))
    with pytest.raises(InputError, match=r"x.ckpt: its config.json names Python code .*not run. Nothing runs it"):
        load(tmp_path / "x.ckpt")


def test_no_shipped_configuration_runs_code_of_models():
    lines = [line.split("#")[0].strip() for path in CONF.rglob("*.yaml") for line in path.read_text().splitlines()]
    given = {line for line in lines if line.startswith("trust_remote_code")}
    assert given == {"trust_remote_code: false", "trust_remote_code: ${..backbone.trust_remote_code}"}


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", "a\\b", "C:"])
def test_modules_out_of_a_folder_are_refused(folder, path):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([modules[0], {**modules[1], "path": path}]))
    (folder / SETTINGS).unlink()
    with pytest.raises(InputError, match=r"modules.json: the path .* of a module leads out of the folder"):
        load(folder)


def test_settings_that_are_none_are_refused(folder):
    for file, text in [
        ("modules.json", "{}"),
        ("modules.json", '[{"type": 1}]'),
        ("tercet.json", "[]"),
        ("config.json", "[" * 100_000),
    ]:
        before = (folder / file).read_text()
        (folder / file).write_text(text)
        with pytest.raises(InputError, match=file):
            load(folder)
        (folder / file).write_text(before)
    change(folder / SETTINGS, weights={"": "/etc/passwd"})
    load(folder)


TEMPLATES = [
    {"name": "default", "template": "a"},
    {"name": "../../../away", "template": "b"},
    {"name": "more", "template": "c"},
]


def test_no_file_is_written_by_the_name_of_a_template(folder, tmp_path):
    """transformers saves each template of a tokenizer in a file that is called after it."""
    change(folder / "tokenizer_config.json", chat_template=TEMPLATES)
    opened = load(folder)
    write_checkpoint(opened, tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    settings = json.loads(content[KEY]["tokenizer"]["tokenizer_config.json"])
    content[KEY]["tokenizer"]["tokenizer_config.json"] = json.dumps({**settings, "chat_template": TEMPLATES})
    torch.save(content, tmp_path / "y.ckpt")
    for i, model in enumerate((opened, load(tmp_path / "x.ckpt"), load(tmp_path / "y.ckpt"))):
        save_model(model, tmp_path / "deep" / "down" / str(i))
    assert not [path for path in tmp_path.rglob("*away*")]
    assert {path.name for path in (tmp_path / "deep").rglob("*.jinja")} == {"chat_template.jinja", "more.jinja"}


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../elsewhere/tokenizer.4.0.json"]}),
        ("model.safetensors.index.json", {"weight_map": {"a": "model.safetensors", "b": "/elsewhere/model.safetensors"}}),
        ("pytorch_model.bin.index.json", {"weight_map": {"a": "..\\x.bin"}}),
    ],
)
def test_files_outside_of_a_folder_are_not_read(folder, file, values):
    (folder / file).touch()
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text() or "{}"), **values}))
    with pytest.raises(InputError, match=rf"its {file} names .*, which is outside of the folder"):
        load(folder)

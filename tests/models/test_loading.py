"""``tercet.load``: runs, checkpoints, model folders, and what cannot be opened."""

import json

import pytest
import torch

from tercet.errors import InputError
from tercet.models import load, save_model
from tercet.models.folder import KEY, SETTINGS, VERSION, encoder_spec
from tests.conftest import MINILM, TEXTS


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
        ("nothing", {}, "path_or_id=.*nothing: no such folder here"),
    ]:
        with pytest.raises(InputError, match=message):
            load(tmp_path / name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing_is_named():
    with pytest.raises(InputError, match="device=cuda, but torch sees no GPU"):
        load(MINILM, device="cuda")


@pytest.mark.parametrize("name", ["../x.txt", "/tmp/x.txt", "inner/x.txt"])
def test_a_checkpoint_writes_nothing_outside_of_its_folder(encoder, tmp_path, name):
    write_checkpoint(encoder, tmp_path / "x.ckpt", tokenizer={name: "x"})
    with pytest.raises(InputError, match=r"it names the file .*x\.txt, outside of its own folder"):
        load(tmp_path / "x.ckpt")


def test_code_in_a_folder_is_not_run(tmp_path, capsys):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("print('this was run')")
    with pytest.raises(InputError, match=r"could not be read as a model.*custom code"):
        load(tmp_path)
    assert "this was run" not in capsys.readouterr().out

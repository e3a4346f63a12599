"""Cards of models, and their way to a local copy of the Hub and back, by its real client."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from omegaconf import OmegaConf
from sentence_transformers import SentenceTransformer
from torch.testing import assert_close

from tercet.app.model_card import CARD, make_card
from tercet.errors import InputError
from tercet.images import PixelFormat
from tercet.models import Head, ImageEncoder, random_backbone
from tercet.models.folder import load, save_model
from tercet.models.hub import model_files, push_folder
from tercet.models.prompts import Prompts
from tests.conftest import TEXTS, composed
from tests.end_to_end.conftest import command, small  # noqa: F401 - fixtures
from tests.hub import TOKEN, check_card, local_hub

METRICS = {"before/retrieval/verses/recall@1": 0.25, "test/retrieval/verses/recall@1": 0.75, "test/sts/stsb/spearman": 0.5,
           "test/sts/avg/spearman": float("nan"), "train/sentences_per_second": 120.0}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    with local_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(encoder, tmp_path):
    """A model folder with a prompt."""
    encoder.prompts = Prompts.of(["query: ", "passage: "])
    save_model(encoder, tmp_path / "model")
    return tmp_path / "model"


def settings(*overrides):
    return OmegaConf.to_container(composed(*overrides), resolve=True)


def test_a_card_says_what_the_record_says_and_nothing_else(encoder, folder):
    given = settings(
        "card.license=apache-2.0", "card.language=[en,enm]", "card.title='Middle <English>'", "card.datasets=me/verses"
    )
    given |= {"command": ["data.path=/somewhere/secret/my.csv", "x=['~/secret/a','/secret/b/']", "y=pkg://a/b", "z=me/c"]}
    given["model"]["backbone"] = {"name": "someone/small-bert"}
    facts = {"steps": 50, "data": {"name": "verses", "fingerprint": "abc"}, "versions": {"torch": "2"}, "revision": "r"}
    text = make_card(encoder, folder, given, METRICS, facts)
    card = ModelCard(text)  # the client's own reader
    assert not check_card(text)
    assert card.data.to_dict() | {"model-index": 0} == {
        "license": "apache-2.0", "language": ["en", "enm"], "base_model": ["someone/small-bert"], "datasets": ["me/verses"],
        "library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity", "metrics": ["recall@1", "spearman"],
        "tags": ["sentence-transformers", "sentence-similarity", "tercet"], "model-index": 0,
    }  # fmt: skip
    found = [(r.task_type, r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [("information-retrieval", "verses", "recall@1", 0.75), ("semantic-similarity", "stsb", "spearman", 0.5)]
    assert (
        "# Middle \\<English\\>" in text
        and "data.path=my.csv" in text
        and "y=pkg://a/b z=me/c" in text
        and "secret" not in text
    )
    for part in ("prompt query (default) | 'query: '", "similarity | cosine", "steps | 50", "learning rate | 0.0001",
                 "0.2500 | 0.7500", "torch | 2", "SentenceTransformer(", f"cut after {encoder.max_length} tokens"):  # fmt: skip
        assert part in text, part


def test_what_is_not_known_is_left_out(encoder, folder):
    text = make_card(encoder, folder, {}, {}, {})
    data = ModelCard(text).data.to_dict()
    assert not {"license", "language", "base_model", "datasets", "model-index", "metrics"} & data.keys()
    assert "Its license has not been stated" in text and "Nothing was measured" in text and "tercet train" not in text


def test_the_card_of_images(tmp_path):
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    encoder = ImageEncoder(random_backbone(config), PixelFormat(32), head=Head("linear", 4))
    save_model(encoder, tmp_path / "model")
    data = ModelCard(make_card(encoder, tmp_path / "model", settings(), {}, {})).data.to_dict()
    assert (data["pipeline_tag"], data["library_name"]) == ("image-feature-extraction", "tercet")


def test_a_trained_model_is_pushed_and_loaded_back(hub, small, command, tmp_path):  # noqa: F811
    """With the card of the run; sentence-transformers and tercet give the vectors that the run's model gives."""
    run = small("card.license=mit")
    assert run.code == 0, run.terminal
    card = ModelCard.load(run.output / "model" / CARD)
    assert card.data.license == "mit" and card.data.eval_results and "steps | 2" in card.text
    shown = command("push", f"model={run.output}", "repo=user/tiny", "--dry-run")
    assert shown.code == 0 and "Nothing was sent" in shown.terminal and not hub.requests
    size = (run.output / "model" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in shown.terminal and CARD in shown.terminal
    sent = command("push", f"model={run.output}", "repo=user/tiny", "card.language=en")
    assert sent.code == 0 and f"sent to user/tiny (private): {hub.url}/user/tiny/commit/" in sent.terminal, sent.terminal
    files = hub.repositories["user/tiny"].branches["main"]
    assert hub.repositories["user/tiny"].private and files.keys() == model_files(run.output / "model").keys()
    assert any(request.startswith("PUT /objects/") for request in hub.requests), "the weights went by LFS"
    card = ModelCard(files[CARD].decode())
    assert (card.data.license, card.data.language) == ("mit", "en") and 'tercet.load("user/tiny")' in card.text
    here = snapshot_download("user/tiny", cache_dir=tmp_path / "cache", token=TOKEN)
    expected = load(run.output).encode(TEXTS)
    assert_close(torch.from_numpy(SentenceTransformer(here).encode(TEXTS)), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(load(here).encode(TEXTS), expected)
    again = command("push", f"model={run.output}/model", "repo=user/tiny", "revision=next", "private=true")
    assert again.code == 0 and set(hub.repositories["user/tiny"].branches) == {"main", "next"}, again.terminal
    assert command("push", f"model={run.output}/model", "repo=user/tiny", "revision=next").code == 0, "the branch is there"


def test_a_public_repository_does_not_get_a_private_model(hub, folder):
    push_folder(folder, "user/open", private=False)
    assert not hub.repositories["user/open"].private
    before = len(hub.requests)
    with pytest.raises(InputError, match=r"repo=user/open is there and public: .*private=false sends it"):
        push_folder(folder, "user/open")
    assert len(hub.requests) == before + 1
    push_folder(folder, "user/open", private=False)


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("POST /api/repos/create", 401, r"does not accept the token.*\(401"),
        ("POST /api/repos/create", 403, r"token may not write there.*\(403"),
        ("/preupload/", 404, r"knows no such user.*\(404"),
        ("/commit/", 409, r"changed by somebody else meanwhile.*\(409"),
        ("PUT /objects/", 500, r"failure of its own.*\(500"),
        ("/commit/", 503, r"failure of its own.*\(503"),
        ("/preupload/", 429, r"too many requests.*\(429"),
        ("PUT /objects/", 0, r"could not be reached, or broke off"),
        ("GET /api/models", 0, r"could not be reached, or broke off"),
        ("/commit/", 418, r"refuses it \(418"),
    ],
)
def test_what_the_hub_answers_becomes_one_message(hub, folder, part, status, message):
    hub.failures[part] = status
    with pytest.raises(InputError, match=rf"^repo=user/tiny: .*{message}") as error:
        push_folder(folder, "user/tiny")
    assert "\n" not in str(error.value) and "Nothing in the repository has changed" in str(error.value)
    assert TOKEN not in str(error.value)
    repository = hub.repositories.get("user/tiny")
    assert not repository or repository.branches == {"main": {}}
    hub.failures.clear()
    push_folder(folder, "user/tiny")
    assert "model.safetensors" in hub.repositories["user/tiny"].branches["main"]


def test_a_push_without_a_token_or_a_network(hub, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(InputError, match="does not accept the token"):
        push_folder(folder, "user/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    before = len(hub.requests)
    with pytest.raises(InputError, match="the Hub needs a token: `hf auth login` asks for one, or set HF_TOKEN"):
        push_folder(folder, "user/tiny")
    assert len(hub.requests) == before
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        push_folder(folder, "user/tiny")
    with pytest.raises(InputError, match="repo=tiny: a user or organization and a name are needed"):
        push_folder(folder, "tiny")
    with pytest.raises(InputError, match=r"the Hub does not take it .*HFValidationError"):
        push_folder(folder, "user/a--b")


def test_what_the_hub_finds_wrong_with_a_card(hub, folder):
    with pytest.raises(InputError, match=r"the Hub refuses it \(400: .*license may not be empty"):
        push_folder(folder, "user/tiny", replaced={CARD: "---\nlicense: ''\n---\n"})


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is a pickle, which may run code .* not sent. .*save_model writes"),
        ("1_Dense/last.ckpt", "1_Dense/last.ckpt is a pickle"),
        ("modeling.py", "modeling.py is no file of a model; it is not sent"),
        ("model-2.safetensors", "model-2.safetensors cannot be read"),
    ],
)
def test_pickles_code_and_damaged_weights_are_not_sent(hub, command, folder, name, message, tmp_path):  # noqa: F811
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    result = command("push", f"model={folder}", "repo=user/tiny")
    assert result.code == 1 and not hub.requests
    assert re.search(message, result.terminal), result.terminal
    assert not (tmp_path / "ran").exists()


def test_links_and_hidden_files_stay_here(hub, folder, tmp_path):
    (folder / ".env").write_text("SECRET=1")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    push_folder(folder, "user/tiny")
    assert not [file for file in hub.repositories["user/tiny"].branches["main"] if file.startswith(".")]
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match=r"notes.txt is a link, which is not sent"):
        push_folder(folder, "user/tiny")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model={tmp}/nothing"], "there is no such folder"),
        (["model={tmp}/run"], "is a run that has not finished"),
        (["card.license=MIT License"], "card.license=MIT License: an id of the Hub is needed"),
        (["card.language=english"], "card.language=english: codes of two or three letters"),
        (["card.base_model=/somewhere/me/model"], "card.base_model=/somewhere/me/model: a hub id is needed"),
        (["repo=tiny"], "repo=tiny: a user or organization"),
    ],
)
def test_what_the_command_refuses(hub, command, folder, overrides, message, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    given = [override.format(tmp=tmp_path) for override in overrides]
    others = {"model": f"model={folder}", "repo": "repo=user/tiny"}
    result = command("push", *given, *(text for key, text in others.items() if not given[0].startswith(f"{key}=")))
    assert result.code == 1 and message in result.terminal and not hub.requests, result.terminal


def test_a_folder_without_a_card_gets_one(hub, command, folder, tmp_path):  # noqa: F811
    """Of a run of an earlier version: from its settings and metrics."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(folder, run / "model")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings("name=old"))))
    (run / "metrics.json").write_text(json.dumps({"test/retrieval/verses/recall@1": 0.75}))
    result = command("push", f"model={run}", "repo=user/tiny", "card.license=mit")
    assert result.code == 0, result.terminal
    card = ModelCard(hub.repositories["user/tiny"].branches["main"][CARD].decode())
    assert card.data.license == "mit" and card.data.eval_results[0].metric_value == 0.75 and "# old" in card.text
    assert not (run / "model" / CARD).exists()

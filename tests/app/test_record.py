"""What a run records of its code, and which of its files are sent."""

import os
import subprocess
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from pytorch_lightning.loggers import WandbLogger

from tercet.app import record
from tercet.training import loggers

SECRETS = [
    "api_key = 'abc'", "WANDB_API_KEY=1234", '"password": "x"', "hf_" + "a" * 34, "ghp_" + "B" * 36, "AKIA" + "C" * 16,
    "url = 'https://me:pass@example.org'", "-----BEGIN OPENSSH PRIVATE KEY-----", "A" * 64, "f" * 40, "access_token: x",
]  # fmt: skip


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """``repository(project, package)``: a committed project of this name whose folder ``package`` is tercet."""

    def made(project, package, ignored=""):
        app = tmp_path / package / "app"
        app.mkdir(parents=True)
        for file in (app / "record.py", app.parent / "__init__.py"):
            file.write_text("before = 1\n")
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
        (tmp_path / ".gitignore").write_text(ignored)
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "one"]):
            subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
        monkeypatch.setattr(record, "__file__", str(app / "record.py"))
        (app / "record.py").write_text("after = 2\n" + "\n".join(SECRETS) + "\nmax_tokens = 3\n")
        (tmp_path / ".env").write_text("KEY=of-the-user\n")
        (tmp_path / "diary.txt").write_text("of the user\n")
        subprocess.run(["git", "-C", str(tmp_path), "add", "-A"], check=True)
        return tmp_path

    return made


def test_changes_are_those_of_the_code_without_secrets(repository, monkeypatch):
    assert repository("tercet", "src/tercet") == record.checkout()
    assert record.revision().endswith("-dirty of tercet's repository")
    changes = record.code_changes()
    assert "+after = 2" in changes and "+max_tokens = 3" in changes
    assert changes.count("(left out: it looks like a secret)") == len(SECRETS)
    assert "of-the-user" not in changes and "diary" not in changes
    monkeypatch.setattr(record, "PATCH_SIZE", 40)
    assert record.code_changes().endswith("\n(cut here)\n") and len(record.code_changes()) < 60


@pytest.mark.parametrize(
    ("package", "ignored"),
    [("src/tercet", ""), ("tercet", ""), ("lib/site-packages/tercet", ""), ("lib/site-packages/tercet", "lib\n")],
)
def test_another_projects_repository_is_not_recorded(repository, package, ignored):
    repository("other", package, ignored)
    assert record.checkout() is None and record.code_changes() == ""
    assert record.revision() == f"tercet {record.__version__}, installed, not of a repository of its own"


def test_without_a_repository_the_version_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "src" / "tercet" / "app" / "record.py"))
    (tmp_path / "src" / "tercet" / "app").mkdir(parents=True)
    assert (record.checkout(), record.code_changes()) == (None, "")


class Recorder(WandbLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        self.sent = {}
        self.run = SimpleNamespace(summary={}, log_artifact=self.keep)

    @property
    def experiment(self):
        return self.run

    @property
    def save_dir(self):
        return "here"

    def keep(self, artifact):
        self.sent[artifact.type] = set(artifact.manifest.entries)


def test_the_runs_own_files_are_sent_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    output = tmp_path / "run"
    own = {
        "record": ["config.yaml", "revision.txt", "metrics.json", "report.html", "pairs.csv", "test_roc.png"],
        "model": [
            "config.json",
            "model.safetensors",
            "tercet.json",
            "tokenizer.json",
            "f/head.safetensors",
            "1_Pooling/config.json",
        ],
        "checkpoints": ["last.ckpt", "last-1.ckpt", "best.ckpt", "random-1.pt"],
    }
    foreign = {
        "record": ["passwords.json", "tax.csv", "notes.txt", "holiday.png", ".env", "a.md", "b.yaml", "sub/config.yaml"],
        "model": ["notes.json", "secret.txt", ".env", "backup/config.json", "id_rsa"],
        "checkpoints": ["notes.txt", "sub/other.ckpt", "x.pt"],
    }
    for files in (own, foreign):
        for kind, names in files.items():
            for name in names:
                path = output / ("" if kind == "record" else kind) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(name)
    (output / "model" / "vocab.txt").symlink_to(output / ".env")
    logger, cfg = Recorder(), OmegaConf.create({"artifacts": "checkpoints", "name": "x"})
    notes = {"revision": "r", "data": {"fingerprint": "f"}}
    record.log_artifacts([logger], output, cfg, {"test/a": 1.0}, notes, [output / "pairs.csv", output / "test_roc.png"])
    assert logger.sent == {kind: set(names) for kind, names in own.items()}


@pytest.mark.parametrize(
    ("mode", "environment", "started"),
    [("online", "offline", "offline"), ("online", "dryrun", "offline"), ("online", "", "online"),
     ("online", "online", "online"), ("offline", "online", "offline"), ("online", "disabled", None),
     ("offline", "disabled", None)],
)  # fmt: skip
def test_the_environment_can_keep_a_run_here(tmp_path, monkeypatch, mode, environment, started):
    modes = []

    def start(**settings):
        modes.append(settings["mode"])
        raise OSError("no network in this test")

    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setenv("WANDB_API_KEY", "local-" + 40 * "0")
    monkeypatch.setattr(loggers, "_start_run", start)
    for name in ("WANDB_DISABLE_GIT", "WANDB_DATA_DIR", "WANDB_SILENT", "WANDB_FINISH_TIMEOUT", "WANDB_FINISH_TIMEOUT_RAISES"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    assert loggers.wandb_logger(mode=mode, save_dir=str(tmp_path)) is None
    assert modes[:1] == ([started] if started else [])
    assert not started or os.environ["WANDB_DISABLE_GIT"] == "true", "it would send another project's changes"

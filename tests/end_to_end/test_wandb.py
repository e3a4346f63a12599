"""Runs logged to Weights & Biases offline, read back from the records on disk."""

import errno
import json
import os
import queue
import shutil
from itertools import count
from pathlib import Path

import pytest
import wandb
import yaml
from PIL import Image

from tercet import messages
from tercet.images import SIDE
from tercet.training.callbacks.figures import shown_files
from tests.conftest import CONF, composed, tiny
from tests.end_to_end.conftest import FAST
from tests.end_to_end.test_train_images import TINY, people  # noqa: F401 - a fixture
from tests.wandb_reader import written

SWEEP = CONF.parent / "docs" / "wandb_sweep.yaml"


@pytest.fixture(autouse=True)
def _nobody(monkeypatch):
    """Without an account, and without the environment variables of another run."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    messages._reported.clear()
    teardown = wandb.teardown  # it reads the environment once in a process
    teardown()
    yield
    teardown()


def raise_disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_is_whole_in_its_folder(small):
    result = small("logger=wandb", "artifacts=checkpoints", "name='my texts/1'", "evaluation@validation=heldout",
                   "trainer.val_check_interval=1", "trainer.log_every_n_steps=1",
                   "callback.embeddings.source=${data.test}")  # fmt: skip
    assert result.code == 0, result.terminal
    assert result.terminal.count("the run is written offline") == 1
    seen = written(result.output)
    assert (seen.run.project, seen.run.display_name, seen.run.run_group) == ("tercet", "my texts/1-1", "my texts/1")
    assert list(seen.run.tags) == ["my texts/1", "simcse_unsup", "bert_small", "text"] and seen.run.job_type == "train"
    assert seen.exit == 0
    assert seen.config["data"]["batch_size"] == 4 and seen.config["loss"]["temperature"] == 0.05
    assert seen.config["data"]["fingerprint"] and seen.config["revision"] and seen.config["versions"]["torch"]
    sections = {key.split("/")[0] for key in seen.keys if not key.startswith(("_", "epoch"))}
    assert sections == {"before", "train", "val", "test", "figures", "tables", "trainer"}, "no chart without a section"
    assert [row["train/loss"] for row in seen.history if "train/loss" in row][1] == result.metrics()["train/loss"]
    assert [row["trainer/global_step"] for row in seen.history if "train/lr" in row] == [0, 1]
    assert result.metrics().items() <= seen.summary.items()
    assert {"config.yaml", "revision.txt", "metrics.json", "report.html", "pairs.csv"} <= seen.artifacts["record"].keys()
    assert not (result.output / "changes.patch").exists(), "it is written where it is asked for"
    assert {"pairs.csv", "embeddings.png"} <= {path.name for path in shown_files(result.output)}
    assert {"model.safetensors", "config.json"} <= seen.artifacts["model"].keys()
    assert "last.ckpt" in seen.artifacts["checkpoints"]
    assert seen.media("tables/pairs") and seen.media("figures/embeddings")
    for file in (file for files in seen.artifacts.values() for file in files.values()):
        assert file.is_file() and result.output in file.parents, "files that `wandb sync` uploads are in the run's folder"


def test_tables_of_images_have_pictures(command, people):  # noqa: F811
    own = ["objective=facenet", "data=images", f"data.path={people}", "data.held_out=12", "sampler.per_label=2",
           "evaluation@test=none", "measure_before=false", "callback.embeddings.source=${data.test}"]  # fmt: skip
    done = command("train", *FAST, *TINY, *own, "logger=wandb_offline")
    assert done.code == 0, done.terminal
    seen = written(done.output)
    for name, column in (("pairs", "other"), ("triplets", "negative")):
        files = seen.artifacts["run_table"]
        table = json.loads(files[f"tables/{name}.table.json"].read_text())
        for row in table["data"]:
            cell = row[table["columns"].index(column)]
            assert cell["_type"] == "image-file" and Image.open(files[cell["path"]]).size == (SIDE, SIDE)


def test_a_job_of_a_sweep_says_so(command, tmp_path):
    (tmp_path / "my.txt").write_text("\n".join(f"A sentence of {i} words." for i in range(40)))
    once = [o for o in FAST if not o.startswith("logger")]
    given = ["-m", "seed=1,2", *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", *once), "logger=wandb_offline",
             "measure_before=false", "callback.embeddings=null", f"hydra.sweep.dir={tmp_path / 'sweep'}"]  # fmt: skip
    done = command("train", *given)
    assert done.code == 0, done.terminal
    runs = [written(tmp_path / "sweep" / job).run for job in ("0", "1")]
    assert [run.run_group for run in runs] == 2 * ["own_texts/sweep"] and "sweep" in runs[0].tags
    assert [run.display_name for run in runs] == ["own_texts-1-0", "own_texts-2-1"]
    assert runs[0].run_id != runs[1].run_id
    assert "wandb:" not in done.terminal, "W&B prints nothing"
    for job in ("0", "1"):
        files = written(tmp_path / "sweep" / job).artifacts["record"]
        assert all(tmp_path / "sweep" / job in file.parents for file in files.values())


def test_wandb_out_of_reach_is_said_and_the_run_goes_on_offline(small, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "local-" + 40 * "0")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    result = small("logger=wandb", "callback.embeddings=null", "measure_before=false")
    assert result.code == 0, result.terminal
    assert result.terminal.count("the run is written offline") == 1
    assert written(result.output).exit == 0


def test_a_run_that_goes_on_is_the_same_in_wandb(small):
    few = ["logger=wandb_offline", "callback.embeddings=null", "measure_before=false", "scheduler=constant"]
    small(*few)
    result = small(*few, "trainer.max_steps=3", "resume=true")
    assert result.code == 0, result.terminal
    runs = [path.name.rsplit("-", 1)[1] for path in (result.output / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1


def test_a_full_disk_is_said_once_and_training_goes_on(small, monkeypatch, caplog):
    monkeypatch.setattr("pytorch_lightning.loggers.csv_logs.ExperimentWriter.save", raise_disk_full)
    usage, calls = shutil.disk_usage, count()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(path) if next(calls) < 9 else usage(path)._replace(free=0))
    result = small("logger=default", "trainer.max_steps=60", "trainer.max_epochs=-1", "trainer.log_every_n_steps=1")
    assert result.code == 0, result.terminal
    for said in (f"WandbLogger in {result.output}: OSError", "metrics.csv could not be written"):
        assert caplog.text.count(said) == 1, caplog.text


@pytest.mark.parametrize("why", ["full", "no folder"])
def test_without_a_place_for_wandb_training_goes_on(small, tmp_path, monkeypatch, why):
    if why == "full":
        monkeypatch.setattr("tercet.training.loggers.MIN_FREE_BYTES", 2**63)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file")
    result = small("logger=wandb_offline", "callback.embeddings=null", "measure_before=false")
    assert result.code == 0, result.terminal
    assert result.terminal.count("the run goes on without it") == 1


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """The commands that W&B's sweep agent starts, with a fake server."""
    import wandb
    import wandb.apis.public.sweeps as server
    from wandb import wandb_agent

    drawn = {"optimizer.lr": {"value": 1.25e-05}, "loss.temperature": {"value": 0.07}}
    spec = yaml.safe_load(SWEEP.read_text())
    orders = [[{"type": "run", "run_id": "ab12cd34", "program": spec["program"], "args": drawn}], [{"type": "exit"}]]
    commands = []

    class Process:
        """A process that has finished at once."""

        def __init__(self, command, **_):
            commands.append(command)

        def poll(self):
            return 0

    monkeypatch.setenv("WANDB_SWEEP_ID", "swp12345")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # the agent sets them: put back afterwards
    monkeypatch.setattr(server, "_sweep_with_runs", lambda *_: {"config": SWEEP.read_text()})
    monkeypatch.setattr(server, "_register_agent", lambda *_, **__: {"id": "agent"})
    monkeypatch.setattr(server, "_agent_heartbeat", lambda *_: orders.pop(0))
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(wandb, "teardown", lambda *_: None)
    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    monkeypatch.setattr(wandb_agent.Agent, "POLL_INTERVAL", 0.01)
    wandb_agent.Agent(None, queue.Queue(), sweep_id="swp12345").run()
    return commands


def test_the_agents_command_composes(agent):
    spec = yaml.safe_load(SWEEP.read_text())
    (command,) = agent
    assert command[1:3] == ["python", "train.py"] and (CONF.parent / command[2]).is_file()
    cfg = composed(*command[3:])
    assert (cfg.optimizer.lr, cfg.loss.temperature) == (1.25e-05, 0.07)
    assert cfg.monitor == spec["metric"]["name"], "what is maximized is measured"


def test_a_run_of_the_agent_is_its_own(small, agent, monkeypatch):
    assert Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).is_file() and os.environ["WANDB_RUN_ID"] == "ab12cd34"
    result = small("logger=wandb", "callback.embeddings=null", "measure_before=false")
    assert result.code == 0, result.terminal
    run = written(result.output).run
    assert (run.run_id, run.sweep_id, run.run_group) == ("ab12cd34", "swp12345", "own_texts/swp12345")
    assert "swp12345" in run.tags
    assert (result.output / "wandb" / "run-id.txt").read_text() == "ab12cd34\n"

"""The small parts around a run."""

import subprocess
import sys

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

import tercet
from tercet import messages
from tercet.app import error_formatting, record
from tercet.app.cli import main
from tercet.app.components import takes
from tercet.app.launch import num_processes
from tercet.app.report import before_after_table
from tercet.distributed.gather import reduce_loss
from tercet.errors import InputError
from tercet.paths import locate
from tercet.training.callbacks.figures import BeforeAfter, draw_before_after, recall_at
from tercet.types import LossOutput
from tests.conftest import composed
from tests.laws.distributed_runs import Listed


def test_help_does_not_load_torch():
    code = "import sys; sys.argv=['x','--help']\nfrom tercet.app.cli import main\ntry: main('train')\nexcept SystemExit: pass\n"
    done = subprocess.run([sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True)
    assert done.stdout.strip().endswith("False"), done.stderr
    assert "trainer" in done.stdout


def test_the_module_lists_its_commands():
    done = subprocess.run([sys.executable, "-m", "tercet"], capture_output=True, text=True)
    assert (done.returncode, "evaluate" in done.stdout) == (0, True)
    assert subprocess.run([sys.executable, "-m", "tercet", "fly"], capture_output=True).returncode == 1


def test_paths_start_here_or_under_the_data_root(tmp_path, monkeypatch):
    (tmp_path / "there.txt").write_text("x")
    monkeypatch.setenv("TERCET_DATA", str(tmp_path))
    assert locate("there.txt") == tmp_path / "there.txt"
    monkeypatch.chdir(tmp_path)
    assert locate("there.txt").name == "there.txt"
    monkeypatch.delenv("TERCET_DATA")
    assert str(locate("nowhere.txt")) == "nowhere.txt"
    assert str(locate("~nobody.txt")) == "~nobody.txt"  # a name; there is no such user


def test_the_mean_divides_the_total_by_the_count_and_each_stat_by_its_own():
    value, logged = reduce_loss(LossOutput(torch.tensor(6.0), torch.tensor(3.0), {"right": torch.tensor([1.5, 6.0])}))
    assert (float(value), float(logged["loss"]), float(logged["right"])) == (2.0, 2.0, 0.25)
    assert float(reduce_loss(LossOutput(torch.tensor(0.0), torch.tensor(0.0)))[0]) == 0.0


def test_metrics_are_written_whole(tmp_path):
    record.write_metrics(tmp_path, {"b": 1.0, "a": 2.0})
    assert (tmp_path / "metrics.json").read_text() == '{\n  "a": 2.0,\n  "b": 1.0\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_before_and_after_stand_side_by_side():
    text = before_after_table({"x/mrr": 0.25}, {"x/mrr": 0.5})
    assert "x/mrr" in text
    assert text.index("0.2500") < text.index("→") < text.index("0.5000")


@pytest.mark.parametrize(("hint", "value", "fine"), [
    (int, 1, True), (int, 1.5, False), (int, "1", False), (int, True, False), (float, 1, True), (float, None, False),
    (float | None, None, True), (str, 1, False), (bool, True, True), (list[str], "a", False), (list[str] | None, None, True),
])  # fmt: skip
def test_values_against_annotations(hint, value, fine):
    assert takes(hint, value) is fine


def test_processes_are_counted():
    def cfg(**trainer):
        return OmegaConf.create({"trainer": {"num_nodes": 1, "strategy": "ddp", "devices": 2, **trainer}})

    assert num_processes(cfg()) == 2
    assert num_processes(cfg(strategy="auto")) == 1
    assert num_processes(cfg(devices=[0, 1, 2])) == 3
    assert num_processes(cfg(strategy="fsdp2", devices=4)) == 4
    with pytest.raises(InputError, match="RUN_ID"):
        num_processes(cfg(num_nodes=2))


@pytest.mark.parametrize(("override", "hint"), [
    ("model.poolng=cls", "Did you mean model.pooling?"), ("lr=1", "Did you mean optimizer.lr?"),
    ("data.train.qery=3", "Did you mean data.train.query?"), ("objectiv=mlm", "Did you mean objective?"),
    ("temperature=1", "Did you mean loss.temperature?"), ("learning_rate=1e-5", "Did you mean optimizer.lr?"),
    ("epochs=3", "Did you mean trainer.max_epochs?"), ("keep=3", "Did you mean keep_last?"),
    ("zzzz=1", "--cfg job"),
])  # fmt: skip
def test_a_mistyped_key_is_answered_with_the_nearest_of_this_configuration(override, hint):
    with pytest.raises(ConfigCompositionException) as caught:
        composed(override)
    text = error_formatting.explain(caught.value, "train")
    assert text.startswith(f"{override.split('=')[0]}: there is no such key.") and hint in text


def test_progress_is_a_line_every_few_seconds(capsys, monkeypatch):
    now = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with messages.ProgressLines("evaluating: ", 40, " sentences") as lines:
        for _ in range(4):
            lines.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 20 of 40 sentences, 0.1 min left", "evaluating: 40 of 40 sentences, 0.0 min left",
    ]  # fmt: skip


def test_progress_counts_the_steps_of_this_process_only(capsys, monkeypatch):
    """Of a step that is added up from several batches none may be done yet; a resumed run begins at its step."""
    now = iter([0.0, 6.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    lines = messages.ProgressLines("step ", 100, "", done=60)
    lines.update(0)
    lines.update(10, ", loss 1.0")
    assert capsys.readouterr().err.splitlines() == ["step 60 of 100", "step 70 of 100, 0.6 min left, loss 1.0"]


def test_errors_without_a_message_of_their_own_say_where_to_look():
    assert error_formatting.explain(KeyError("x"), "train") == "KeyError: 'x' (TERCET_DEBUG=1 shows where)"
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = InputError("inner `size`=3")
    assert error_formatting.explain(wrapped, "train") == "inner size=3"


def test_the_figure_and_the_neighbours_show_the_change():
    torch.manual_seed(0)
    before, after = torch.rand(12, 12), torch.eye(12) * 0.5 + 0.1
    assert (recall_at(1, after), recall_at(12, before)) == (1.0, 1.0)
    figure = draw_before_after(before, after)
    assert "100 %" in figure.axes[2].get_title()
    callback = BeforeAfter(Listed(("a", "b")), pairs=12, examples=3)
    callback.scores = {"before": before, "test": after}
    text = callback.neighbors()
    assert text.count("| after | 1 |") == 3
    assert text.count("✓") >= 3


def test_accumulation_is_warned_about(recwarn):
    from tercet.app.config_checks import check_config
    from tercet.training import SimCSEUnsup

    cfg = composed("data=text", "data.path=x", "trainer.accumulate_grad_batches=4")
    check_config(cfg, SimCSEUnsup, _Data())
    assert any("accumulate_grad_batches=4" in str(w.message) for w in recwarn)


class _Data:
    name = "listed"
    columns = ("a",)


def test_a_run_of_version_0_1_is_not_resumed_by_mistake(tmp_path):
    from tercet.app.commands.train import check_resume

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "config.yaml").write_text("batches: {_target_: tercet.data.GlobalBatches}\n")
    with pytest.raises(InputError, match=r"a run of Tercet 0\.1.*init_from="):
        check_resume(composed("resume=true"), tmp_path)


def test_versions_are_recorded_where_the_package_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [])
    monkeypatch.setattr(record, "_git", lambda *arguments, folder=None: "")
    assert record.versions()["tercet"] == tercet.__version__
    assert record.revision() == f"tercet {tercet.__version__}, installed, not of a repository of its own"


COMMANDS = {
    "evaluate": (["model=/a b/c=d", "--cfg=job"], "path: /a b/c=d"),
    "mine": (["model=[a,b]", "data.path=p.csv", "output=o.csv", "--cfg=job"], "- a\n  - b"),
    "export": (["--cfg=job", "model=m", "output=o"], "path: m"),
    "expand": (["model=m", "vectors=v", "--cfg=job", "output=o"], "vectors: v"),
    "compare": (["a/run", "--cfg=job", "b", "metric=x"], "runs:\n- a/run\n- b\nmetric: x"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose_from_their_arguments(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tercet", "no=argument"])  # is not read
    arguments, expected = COMMANDS[command]
    with pytest.raises(SystemExit) as stopped:
        main(command, arguments)
    assert not stopped.value.code
    assert expected in capsys.readouterr().out


def test_choices_that_are_gone_are_explained(capsys):
    for group, text in (("data=files", "data=table"), ("data=text", "data=table")):
        with pytest.raises(SystemExit):
            main("evaluate", [group, "model=x"])
        assert text in capsys.readouterr().err

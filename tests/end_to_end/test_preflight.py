"""check=true says what a run would take, and keeps nothing."""

import re

from tercet.app.commands.preflight import format_duration
from tests.conftest import tiny
from tests.end_to_end.conftest import FAST, write_texts


def run(command, tmp_path, *more):
    write_texts(tmp_path / "my.txt")
    few = [o for o in FAST if "max_steps" not in o]
    return command("train", *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", *few, "check=true", *more))


def test_it_counts_the_steps_and_the_texts_and_keeps_nothing(command, tmp_path):
    result = run(command, tmp_path, "trainer.max_epochs=3", "trainer.max_steps=-1")
    assert result.code == 0 and "check passed" in result.terminal, result.terminal
    rows = int(re.search(r"data +(\d+) rows", result.terminal)[1])
    assert f"{rows // 4 * 3} steps of 4" in result.terminal, "4 a batch, three epochs"
    texts = int(re.search(r"measuring +(\d+) texts", result.terminal)[1])
    assert texts == 2 * 15, "the halves of eight held-out texts, two of them equal, before and after"
    assert not result.output.exists()


def test_it_finds_what_only_a_step_shows(command, tmp_path):
    result = run(command, tmp_path, "model.normalize=false", "optimizer.lr=1e30", "trainer.gradient_clip_val=null")
    assert result.code == 1 and "check: the loss is nan" in result.terminal, result.terminal


def test_spans_are_for_people():
    assert [format_duration(x) for x in (5, 300, 7200)] == ["5 s", "5 min", "2.0 h"]

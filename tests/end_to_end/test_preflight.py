"""check=true says what a run would take, and keeps nothing."""

import re

import pytest

from tercet.app.commands.preflight import format_duration
from tests.conftest import choices, tiny
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


FEW = ["trainer.accelerator=cpu", "logger=none", "check=true", "num_threads=1"]
SMALL = {  # what keeps an experiment of texts short; the data and everything else are its own
    "quick_thoughts_small": ["data.held_out=2000"],
    "quick_thoughts_minilm": tiny("data.held_out=2000"),
    "facenet_lfw_small": ["data.workers=0"],
    "facenet_questions": tiny("~test.reference"),
    "pretrain_english_small": tiny(
        "data.where={source:[speech]}", "data.train.sources.books=null", "data.validation.sources.books=null", "data.workers=0"
    ),
}
AT_HAND = [name for name in choices("experiment") if "base" not in name and "large" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in AT_HAND if name not in ("facenet", "quick_thoughts", "own_texts")])
def test_every_experiment_whose_data_is_at_hand_starts(name, command, shared):
    """The settings of an experiment, with its own data, are tried whole; those left out need the hub or the user's data."""
    result = command("train", f"experiment={name}", *SMALL.get(name, tiny()), *FEW)
    assert result.code == 0 and "check passed" in result.terminal, result.terminal

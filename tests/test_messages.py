"""Text of unknown origin: in terminals, tables, Markdown and figures."""

import csv
import logging
from types import SimpleNamespace

import pytest
import torch

from tercet.app import cli
from tercet.errors import InputError
from tercet.evaluation.figures import figure_text
from tercet.messages import csv_cell, markdown_text, print_status, printable, warn_once
from tercet.training.callbacks.figures import BeforeAfter, make_axes, publish_figure, publish_table, shown_files

STEERING = "\x1b[2J \x07 \r \x9b31m \u202e \u2028 \x00 \udce9"


def test_what_steers_a_terminal_is_shown_and_not_sent():
    shown = printable(f"é\tÅngström\n{STEERING}")
    assert shown == "é\tÅngström\n\\x1b[2J \\x07 \\r \\x9b31m \\u202e \\u2028 \\x00 \\udce9"
    assert shown.encode() and printable("a\nb\tc", lines=False) == r"a\nb\tc"


def test_no_message_steers_a_terminal(capsys, caplog):
    print_status(STEERING)
    with caplog.at_level(logging.WARNING, "tercet"):
        warn_once(STEERING)
    text = cli.report_error(InputError(f"path={STEERING}: no such file"), "train")
    seen = capsys.readouterr().err
    for shown in (seen, caplog.text, text):
        assert r"\x1b[2J \x07 \r" in shown and not set(shown) & set("\x1b\x07\r\x9b\u202e\x00")


def test_a_traceback_does_not_steer_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERCET_DEBUG", "1")
    cli.report_error(ValueError(STEERING), "train")
    seen = capsys.readouterr().err
    assert "ValueError" in seen and "\x1b" not in seen


@pytest.mark.parametrize(
    ("cell", "written"),
    [("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("+A1", "'+A1"), ("-A1", "'-A1"), ("\t=1", "'\t=1"), ("＝1", "'＝1"),
     ("-0.5", "-0.5"), ("+1e-05", "+1e-05"), ("-", "-"), ("a=1", "a=1"), (-0.5, -0.5), (None, None), ("", "")],
)  # fmt: skip
def test_no_cell_is_a_formula(cell, written):
    assert csv_cell(cell) == written


def test_markdown_has_no_meaning():
    assert markdown_text("![x](http://x) | `a`\n# <b> $x$") == r"\!\[x\](http://x) \| \`a\` \# \<b\> \$x\$"


@pytest.mark.parametrize("text", ["$a_{$", "$x$", r"\$x$", "5 $ and 6 $", "a $\\frac{$ b", "plain"])
def test_figures_draw_any_text(tmp_path, text):
    figure, (axis,) = make_axes(2, 2)
    axis.set_title(figure_text(text))
    figure.savefig(tmp_path / "x.png")
    assert axis.title.get_text().replace(r"\$", "$") == text


def test_a_runs_tables_are_text(tmp_path):
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True, loggers=[], global_step=1)
    publish_table(trainer, "pairs", ("what", "text"), [("nearest", "=HYPERLINK(1)"), ("nearest", "- he said")])
    figure, _ = make_axes(2, 2)
    publish_figure(trainer, "map", figure)
    (tmp_path / "foreign.png").write_bytes(b"")
    with (tmp_path / "pairs.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["what", "text"], ["nearest", "'=HYPERLINK(1)"], ["nearest", "'- he said"]]
    assert {path.name for path in shown_files(tmp_path)} == {"pairs.csv", "map.png"}


def test_neighbors_are_text():
    callback = BeforeAfter(examples=1)
    callback.texts = (["# <img src=http://x>", "b"], ["a | b\n| c |", "d"])
    callback.scores = {"before": torch.eye(2), "test": torch.eye(2)}
    lines = callback.neighbors().splitlines()
    assert r"> \# \<img src=http://x\>" in lines and r"| before | 1 | a \| b \| c \| ✓ |" in lines
    assert [line.count("|") - line.count(r"\|") for line in lines if line.startswith("|")] == [4, 4, 4, 4, 4]

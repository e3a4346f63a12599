"""What the command line sets before a command runs."""

import os

import pytest

from tercet import __main__, __version__
from tercet.app import cli
from tercet.app.error_formatting import explain


@pytest.mark.parametrize(
    ("name", "given", "used"),
    [
        ("OMP_WAIT_POLICY", None, "PASSIVE"),
        ("OMP_WAIT_POLICY", "ACTIVE", "ACTIVE"),
        ("GOMP_SPINCOUNT", None, "2000"),
        ("GOMP_SPINCOUNT", "7", "7"),
        ("THP_MEM_ALLOC_ENABLE", None, "1"),
        ("THP_MEM_ALLOC_ENABLE", "0", "0"),
    ],
)
def test_what_torch_reads_when_it_is_loaded_is_set_before_unless_the_shell_has_it(name, given, used, monkeypatch):
    """Threads spin for each other for a moment only; memory comes in huge pages."""
    for own in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(own, "")  # put back at the end
        monkeypatch.delenv(own)
    if given is not None:
        monkeypatch.setenv(name, given)
    with pytest.raises(SystemExit):
        cli.main("compare", ["--help"])
    assert os.environ[name] == used
    assert ("GOMP_SPINCOUNT" in os.environ) == (given != "ACTIVE"), "it would take precedence of the policy"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands_by_task(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tercet", *arguments])
    __main__.main()
    text = capsys.readouterr().out
    assert all(f"\n  {name:11}" in text for name in cli.COMMANDS)
    assert "\n\nmeasure\n  evaluate " in text


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tercet", "--version"])
    __main__.main()
    assert capsys.readouterr().out == f"tercet {__version__}\n"


@pytest.mark.parametrize("arguments", [["doctor", "--jsn"], ["completion", "tcsh"], ["evaluate", "--outputs"]])
def test_a_mistyped_option(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tercet", *arguments])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.split("error: ")[1:]
    assert arguments[1] in line and line.count("\n") == 1


@pytest.mark.parametrize(("text", "extra"), [
    ("No module named 'optuna'", "sweeps"), ("Neither `tensorboard` nor `tensorboardX` is available.", "tensorboard"),
])  # fmt: skip
def test_a_library_that_is_missing_is_named_with_its_extra(text, extra):
    assert explain(ModuleNotFoundError(text), "train").endswith(f"pip install 'tercet[{extra}]'.")


def test_a_mistyped_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tercet", "trian", "data=text"])
    with pytest.raises(SystemExit, match="1"):
        __main__.main()
    assert capsys.readouterr().err == "error: trian is no command. Did you mean train? `tercet --help` lists them.\n"

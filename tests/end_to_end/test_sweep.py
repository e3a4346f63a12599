"""Multiruns from the command line."""

from tests.conftest import tiny
from tests.end_to_end.conftest import FAST, write_texts


def test_a_sweep_begun_again_makes_what_is_missing(command, tmp_path):
    write_texts(tmp_path / "my.txt")
    once = [o for o in FAST if not o.startswith("logger")]
    given = ["-m", *tiny("data=text", f"data.path={tmp_path / 'my.txt'}", *once), "logger=none", "measure_before=false",
             "sweep=temperature", "loss.temperature=0.05,0.1", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}"
    ]  # fmt: skip
    first = command("train", *given)
    assert first.code == 0 and "loss.temperature" in first.terminal, first.terminal
    kept = (tmp_path / "sweep" / "0" / "metrics.json").stat().st_mtime_ns
    (tmp_path / "sweep" / "3" / "metrics.json").unlink()
    again = command("train", *given, "resume=true")
    assert again.code == 0 and again.terminal.count("is finished") == 3, again.terminal
    assert (tmp_path / "sweep" / "0" / "metrics.json").stat().st_mtime_ns == kept
    assert (tmp_path / "sweep" / "3" / "metrics.json").is_file()
    table = command(
        "compare", str(tmp_path / "sweep"), "metric=test/geometry/text/alignment", f"output={tmp_path / 'out'}"
    )
    assert table.code == 0 and "less is better" in table.terminal, table.terminal
    assert (tmp_path / "out" / "comparison.txt").is_file()

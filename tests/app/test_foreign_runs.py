"""Run folders of strangers: read as plain data, bounded, and shown as text."""

import csv
import json
import os
import zipfile

import numpy as np
import pytest
from omegaconf import OmegaConf

from tercet.app import examples, record
from tercet.app.commands import compare
from tercet.app.run_files import read_settings
from tercet.errors import InputError
from tests.app.test_compare import lay
from tests.conftest import composed, tiny

BOMB = "\n".join(
    ["a: &a [x, x]", *(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=False)), "seed: 1"]
)


def test_what_a_run_writes_is_read_as_it_was(tmp_path):
    cfg = composed(*tiny("loss.temperature=0.00001", "name='1e5'"))
    cfg.output_dir = "outputs/2026-01-01"
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    assert read_settings(tmp_path) == OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "anchors and aliases are not accepted"),
        ("seed: &one 1\n", "anchors and aliases are not accepted"),
        ("seed: " + "[" * 50_000, "more than 32 levels are not accepted"),
        ("seed: " + "9" * 5000, "Exceeds the limit"),
        ("x: " + "a" * (1 << 19), "524,288 are accepted"),
        ("!!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("seed: [", "cannot be read as the settings of a run"),
        ("{[1]: 2}", "unhashable key"),
        ("- 1", "keys with values are needed"),
        ("seed: one", "seed .* is amiss"),
        ("seed: 1\ncommand: {a: 1}", "command .* is amiss"),
    ],
)
def test_a_configuration_that_is_none_is_refused(tmp_path, text, message):
    lay(tmp_path / "run", 1, {"test/a": 1.0})
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"run/config.yaml.*{message}"):
        compare.read_runs([tmp_path])


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"test/a": ' + "9" * 5000 + "}", '{"test/a": "1"}', '{"test/a": [1]}', "[]", '{"test/a": 1', "\xff", "",
     '{"test/a": ' + "9" * 400 + "}", '{"test/a": true}'],
)  # fmt: skip
def test_metrics_that_are_none_are_refused(tmp_path, text):
    lay(tmp_path / "run", 1, {"test/a": 1.0})
    (tmp_path / "run" / "metrics.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"run/metrics.json"):
        compare.read_runs([tmp_path])


def test_a_pipe_or_a_device_is_no_file_of_a_run(tmp_path):
    lay(tmp_path / "run", 1, {"test/a": 1.0})
    (tmp_path / "run" / "config.yaml").unlink()
    os.mkfifo(tmp_path / "run" / "config.yaml")
    with pytest.raises(InputError, match="no finished run"):
        compare.read_runs([tmp_path])


def test_values_by_example_that_cannot_be_read_are_left_out(tmp_path, caplog):
    for i in (1, 2):
        lay(tmp_path / str(i), 1, {"test/a": float(i)}, f"x={i}")
    whole = {"a": np.ones(4, np.float32)}
    np.savez_compressed(tmp_path / "1" / examples.EXAMPLES, **whole)
    file = tmp_path / "2" / examples.EXAMPLES
    np.savez_compressed(tmp_path / "large.npz", a=np.zeros(1 << 27, np.float32))
    with zipfile.ZipFile(tmp_path / "wide.npz", "w") as archive:
        archive.writestr(
            "a.npy",
            b"\x93NUMPY\x01\x00v\x00"
            + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,), }".ljust(117)
            + b"\n",
        )
    made = {
        "not finite": lambda: np.savez(file, a=np.array([1.0, np.nan, 1.0, 1.0])),
        "pickle": lambda: np.savez(file, a=np.array([{}], dtype=object)),
        "cut": lambda: file.write_bytes((tmp_path / "1" / examples.EXAMPLES).read_bytes()[:90]),
        "none": lambda: file.write_bytes(b"no archive"),
        "large": lambda: (tmp_path / "large.npz").replace(file),
        "wide": lambda: (tmp_path / "wide.npz").replace(file),
    }
    for name, make in made.items():
        caplog.clear()
        make()
        compare.compare_examples.cache_clear()
        assert compare.compare_examples(((tmp_path / "1" / examples.EXAMPLES,), (file,)), "a") == {}, name
        assert "Its values by example are left out" in caplog.text, name


HOSTILE = [
    "$a_{$", "=cmd|'/c calc'!A1", "\x1b[2J\x1b]0;owned\x07", "<script>alert(1)</script>", '" onerror="x', "${oc.env:SECRET}",
    "a\nb", "@SUM(1)", "\u202egnp", "é\udce9",
]  # fmt: skip


def test_what_strangers_wrote_is_text_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SECRET", "the secret of the environment")
    for i, value in enumerate(HOSTILE):
        lay(tmp_path / str(i), 1, {"test/a$_{$": i / 10, "test/=b": 0.5}, f"x={value}")
    compare.run(OmegaConf.create({"runs": str(tmp_path), "metric": None, "output": str(tmp_path / "out")}), tmp_path)
    terminal = capsys.readouterr().err
    shown = {name: (tmp_path / "out" / name).read_text("utf-8") for name in ("comparison.txt", "comparison.csv", "report.html")}
    for name, text in {"terminal": terminal, **shown}.items():
        assert "the secret" not in text and "${oc.env:SECRET}" in text, name
        assert not set(text) & set("\x1b\x07\u202e"), name
    assert r"\x1b[2J" in terminal and r"a\nb" in terminal and r"\udce9" in terminal
    assert "<script" not in shown["report.html"] and 'onerror="x' not in shown["report.html"]
    assert "default-src 'none'" in shown["report.html"]
    with (tmp_path / "out" / "comparison.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'=cmd|'/c calc'!A1" in cells and "'@SUM(1)" in cells and "$a_{$" in cells
    assert not [cell for cell in cells if cell[:1] in "=@+" and cell]
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


def test_settings_of_another_run_are_not_resolved(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"name": "${oc.env:HOME}", "seed": 1}))
    cfg = OmegaConf.create({"name": os.environ["HOME"], "seed": 1})
    assert (
        record.first_difference(read_settings(tmp_path), cfg, lambda key: True)
        == f"name=${{oc.env:HOME}}, not {os.environ['HOME']}"
    )

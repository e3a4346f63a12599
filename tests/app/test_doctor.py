"""The command ``doctor`` says what training needs, what is there, and how to get the rest."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata

import pytest

from tercet import __version__
from tercet.app.commands import doctor
from tests.conftest import CONF

DATA = CONF.parent / "docs" / "lab" / "README.md"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    for name in ("TERCET_DATA", "HF_HUB_OFFLINE", "HF_ENDPOINT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def asked(capsys, *arguments):
    """The exit code and the checks by name."""
    code = doctor.main(["--json", *arguments])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] == (code == 0)
    return code, {check["name"]: check for check in answer["checks"]}


class Metadata(metadata.Distribution):
    """An installed Tercet that asks for what is given."""

    version = __version__

    def __init__(self, requires, python=">=3.10"):
        self.given, self.python = requires, python

    def read_text(self, filename):
        extras = sorted(set(re.findall("extra == '(.*?)'", " ".join(self.given))))
        lines = [f"Requires-Dist: {line}" for line in self.given] + [f"Provides-Extra: {extra}" for extra in extras]
        head = f"Metadata-Version: 2.1\nName: tercet\nVersion: {__version__}\nRequires-Python: {self.python}\n"
        return head + "\n".join(lines) if filename == "METADATA" else None

    def locate_file(self, path):
        raise NotImplementedError


@pytest.fixture
def installed(monkeypatch):
    """Make ``tercet`` ask for other packages."""
    found = metadata.distribution

    def ask(*requires, **settings):
        ours = Metadata(requires, **settings)
        monkeypatch.setattr(metadata, "distribution", lambda name: ours if name == "tercet" else found(name))

    return ask


def test_here_training_can_start(capsys):
    code, checks = asked(capsys)
    assert code == 0, [check for check in checks.values() if check["status"] == "missing"]
    assert checks["torch"]["status"] == checks["extra quickstart"]["status"] == checks["W&B"]["status"] == "ok"
    assert "no account" in checks["W&B"]["value"]
    assert re.search(r"\d cores, .* GB free of", checks["cpu"]["value"])
    assert checks["TERCET_DATA"]["status"] == "note"
    assert "--online" in checks["hub"]["value"]
    assert not doctor.main([])
    assert capsys.readouterr().out.endswith("\nTraining can start: tercet train\n")


def test_what_is_missing_is_named_with_its_line(installed, capsys):
    installed(
        "torch>=99", "no-such-package<2", "gt-none; extra == 'quickstart'", "numpy; extra == 'books'", "gt-none; extra == 'ray'"
    )
    code, checks = asked(capsys)
    assert code == 1
    assert [name for name, check in checks.items() if check["status"] == "missing"] == [
        "torch", "no-such-package", "extra quickstart",
    ]  # fmt: skip
    assert checks["torch"]["advice"] == "pip install 'torch>=99'"
    assert checks["no-such-package"]["value"] == "not installed (asked: <2)"
    assert checks["extra quickstart"]["advice"] == "pip install 'tercet[quickstart]'"
    assert (checks["extra books"]["status"], checks["extra ray"]["status"]) == ("ok", "note")
    assert "cpu" not in checks  # torch is not imported
    assert doctor.main([]) == 1
    assert "cannot start. Missing: torch, no-such-package, extra quickstart." in capsys.readouterr().out


def test_another_python_an_old_installation_and_a_broken_library(installed, capsys, monkeypatch):
    installed(python=">=3.99")
    monkeypatch.setattr(doctor, "__version__", "99.0")

    def broken(name):
        raise OSError("libcudart.so.99: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    code, checks = asked(capsys)
    assert (code, checks["python"]["advice"]) == (1, "Python >=3.99 is needed.")
    assert checks["tercet"]["value"].endswith(f"installed as {__version__}")
    assert checks["training"]["value"] == "cannot be imported (OSError: libcudart.so.99: cannot open shared object file)"


def test_disks(elsewhere, capsys, monkeypatch):
    (elsewhere / "cache").touch()  # a file in its place
    code, checks = asked(capsys)
    assert (code, checks["cache of tokens"]["value"]) == (1, f"{elsewhere / 'cache'} cannot be written")
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e18)
    assert doctor.check_disk("outputs", elsewhere / "outputs", "Move.").status == "missing"


def test_the_data_root(elsewhere, monkeypatch):
    listed = re.findall(r"^\| `([\w.]+\.parquet)` \|", DATA.read_text(), re.MULTILINE)
    assert doctor.data_files() == sorted(listed)
    monkeypatch.setenv("TERCET_DATA", str(elsewhere))
    (elsewhere / "sts.parquet").touch()
    assert "1 of 9 files; not books_ordered.parquet" in doctor.check_data().value
    for name in listed:
        (elsewhere / name).touch()
    assert doctor.check_data().status == "ok"


def test_the_hub_is_asked_only_if_that_is_asked_for(monkeypatch):
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):  # the name that http.server looks for
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Print nothing."""

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert doctor.check_hub(False).status == "ok" and not asked
    assert doctor.check_hub(True).value.endswith(" answers") and len(asked) == 1
    server.shutdown()
    server.server_close()
    gone = doctor.check_hub(True)
    assert gone.status == "note" and "does not answer" in gone.value
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.check_hub(True).value


def test_a_source_tree_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "_distribution", lambda name: None)
    tercet, python = doctor.check_installation()
    assert (tercet.status, python.status) == ("note", "ok") and "pip install -e ." in tercet.advice
    assert not list(doctor.check_packages()) and not list(doctor.check_extras())

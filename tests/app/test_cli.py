"""What the command line sets before a command runs."""

import os

import pytest

from tercet.app import cli


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_do_not_spin_for_each_other_unless_that_is_asked_for(given, used, monkeypatch):
    """Set before torch, which reads it when it is loaded; that of the user's shell stays."""
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        cli.main("compare", ["--help"])
    assert os.environ["OMP_WAIT_POLICY"] == used

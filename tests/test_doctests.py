"""The examples in the docstrings of the library run, and every exported name is used in one."""

import doctest
import importlib
import inspect
import pkgutil
import re
from importlib.util import find_spec

import pytest

import tercet

LIBRARY = ("losses", "models", "views", "data", "evaluation", "distributed", "search")
INTERFACES = {"Encoder", "View"}  # their implementations have examples
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
OTHERS = ("tercet.app", "tercet.__", *(() if find_spec("triton") else ("tercet.models.engine.triton_jit",)))
MODULES = [m.name for m in pkgutil.walk_packages(tercet.__path__, "tercet.") if not m.name.startswith(OTHERS)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name), optionflags=OPTIONS).failed == 0


@pytest.mark.parametrize("package", LIBRARY)
def test_every_exported_name_is_used_in_an_example(package):
    modules = [importlib.import_module(name) for name in MODULES if name.startswith(f"tercet.{package}.")]
    lines = [e.source for m in modules for test in doctest.DocTestFinder().find(m) for e in test.examples]
    used = set(re.findall(r"\w+", " ".join(lines)))
    exported = importlib.import_module(f"tercet.{package}")
    assert set(exported.__all__) - INTERFACES <= used
    assert all(inspect.getdoc(getattr(exported, name)) for name in exported.__all__)

"""The examples in docstrings run, and every name that the library exports has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import tercet

LIBRARY = ("losses", "models", "views", "data", "evaluation", "distributed")
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [m.name for m in pkgutil.walk_packages(tercet.__path__, "tercet.") if not m.name.startswith("tercet.__")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name), optionflags=OPTIONS).failed == 0


EXPORTED = [(package, name) for package in LIBRARY for name in importlib.import_module(f"tercet.{package}").__all__]


@pytest.mark.parametrize(("package", "name"), EXPORTED)
def test_an_exported_name_has_an_example(package, name):
    """In its docstring, or in that of a method."""
    exported = getattr(importlib.import_module(f"tercet.{package}"), name)
    members = vars(exported).values() if inspect.isclass(exported) else ()
    docs = [inspect.getdoc(x) or "" for x in (exported, *members)]
    assert any(">>>" in doc for doc in docs)

"""What waits for another library's import happens then, whoever looked for the library before."""

import importlib
import importlib.util
import sys

import pytest

from effvit._when_imported import when_imported


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "effvit_waits_for_this.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "effvit_waits_for_this"
    sys.modules.pop("effvit_waits_for_this", None)


def test_after_the_import(library):
    found = []
    when_imported(library, lambda module: found.append(module.value))
    assert importlib.util.find_spec(library) is not None and found == []
    module = importlib.import_module(library)
    assert found == [1]
    importlib.reload(module)
    assert found == [1, 1]


def test_at_once(library):
    module, found = importlib.import_module(library), []
    when_imported(library, found.append)
    assert found == [module]


def test_a_library_that_is_not_there():
    when_imported("effvit_waits_in_vain", pytest.fail)
    assert importlib.util.find_spec("effvit_waits_in_vain") is None

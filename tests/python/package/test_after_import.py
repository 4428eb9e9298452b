"""hqq_cpp._after_import: functions that run when another package is imported."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import threading
import types
import warnings
import zipfile

import pytest

from hqq_cpp._after_import import after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Name of an importable package of its own with a module `inner`."""
    name = f"after_{tmp_path.name}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("value = 1\n")
    (folder / "inner.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def record(module_name):
    """A list that gets the module's `value`, or what there is instead, at every call."""
    calls = []
    after_import(module_name, lambda: calls.append(sys.modules[module_name].value))
    return calls


@pytest.mark.parametrize("inner", ("", ".inner"))
def test_calls_at_the_end_of_an_import(package, inner):
    calls = record(package + inner)
    assert calls == []
    module = importlib.import_module(package + inner)
    assert calls == [module.value]
    importlib.import_module(package + ".inner")
    assert calls == [module.value]


def test_calls_at_once_for_an_imported_module(package):
    importlib.import_module(package)
    assert record(package) == [1]
    assert record(package + ".inner") == []


def test_the_same_function_twice_is_once(package):
    calls = []

    def callback():
        calls.append(1)

    for _ in range(2):
        after_import(package, callback)
    others = record(package)
    importlib.import_module(package)
    after_import(package, callback)
    assert calls == [1] and others == [1]


def test_looking_for_a_module_calls_nothing(package):
    calls = record(package)
    for _ in range(2):
        spec = importlib.util.find_spec(package)
        assert spec.name == package and "value = 1" in spec.loader.get_source(package)
    assert package not in sys.modules and calls == []
    importlib.import_module(package)
    assert calls == [1]


def test_the_module_has_its_own_loader(package):
    record(package)
    module = importlib.import_module(package)
    kind = importlib.machinery.SourceFileLoader
    assert type(module.__loader__) is kind and type(module.__spec__.loader) is kind
    assert inspect.getsource(module) == "value = 1\n"


def test_reload_calls_again(package):
    calls = record(package)
    module = importlib.import_module(package)
    importlib.reload(module)
    assert calls == [1, 1]


def test_a_module_that_does_not_exist():
    calls = record("no_such_module_of_anyone")
    assert importlib.util.find_spec("no_such_module_of_anyone") is None
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module_of_anyone'"):
        importlib.import_module("no_such_module_of_anyone")
    assert calls == []


def test_an_import_that_fails_calls_nothing(package, tmp_path):
    inner = tmp_path / package / "broken.py"
    inner.write_text("raise ImportError('not today')\n")
    calls = record(package + ".broken")
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module(package + ".broken")
    assert calls == []
    inner.write_text("value = 'repaired'  # of another length\n")
    importlib.invalidate_caches()
    importlib.import_module(package + ".broken")
    assert calls == ["repaired"]


def test_a_function_that_fails_is_a_warning(package):
    def callback():
        raise AttributeError("has no quantizers")

    after_import(package, callback)
    others = record(package)
    with pytest.warns(UserWarning, match=rf"{package} was imported, but .* has no quantizers"):
        importlib.import_module(package)
    assert others == [1]


def test_archives(tmp_path, monkeypatch):
    # One loader serves all modules of an archive.
    archive = tmp_path / "modules.zip"
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("in_archive/__init__.py", "value = 'a'")
        written.writestr("in_archive/other.py", "value = 'b'")
    monkeypatch.syspath_prepend(archive)
    calls = record("in_archive")
    importlib.import_module("in_archive.other")
    assert calls == ["a"]


@pytest.mark.parametrize("in_front", ("asks everybody", "finds alone"))
def test_finders_of_others(package, monkeypatch, in_front):
    calls = record(package)

    class Finder:
        """Import hooks of others (editable installs, type checkers) stand before ours."""

        busy = False

        def find_spec(self, fullname, path=None, target=None):
            if fullname != package or self.busy:
                return None
            if in_front == "finds alone":
                return importlib.machinery.PathFinder.find_spec(fullname, path, target)
            self.busy = True
            try:
                return importlib.util.find_spec(fullname)
            finally:
                self.busy = False

    # The object is what a finder of older Pythons looks like to us: it has no find_spec.
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path, object()])
    importlib.import_module(package)
    importlib.import_module(package + ".inner")
    assert calls == [1]


def test_modules_that_come_without_an_import(package, monkeypatch):
    calls = record("made_by_" + package)
    module = types.ModuleType("made_by_" + package)
    module.value = "made"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    importlib.import_module(package)
    assert calls == ["made"]


def test_asked_for_while_the_module_is_imported(package, tmp_path):
    (tmp_path / package / "__init__.py").write_text(
        "import sys\nfrom hqq_cpp._after_import import after_import\n"
        "calls = []\n"
        "after_import(__name__, lambda: calls.append(sys.modules[__name__].value))\n"
        "assert not calls\n"
        "value = 1\n"
    )
    module = importlib.import_module(package)
    importlib.import_module(package + ".inner")
    assert module.calls == [1]


def test_threads_see_the_module_with_our_part(package, tmp_path):
    (tmp_path / package / "__init__.py").write_text(
        "import time\ntime.sleep(.05)\nvalue = 1\nready = False\n"
    )
    calls = []

    def callback():
        sys.modules[package].ready = True
        calls.append(1)

    after_import(package, callback)
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(importlib.import_module(package).ready))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8 and calls == [1]


def test_lazy_loaders(package):
    calls = record(package)
    spec = importlib.util.find_spec(package)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    spec.loader.exec_module(module)
    assert calls == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.value == 1
    assert calls[:1] == [1]

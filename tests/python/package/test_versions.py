"""Versions of torch and Transformers: which work, and what the others are told."""

from __future__ import annotations

import re
import runpy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import core_model_loading

from hqq_cpp import _torch_version as torch_versions
from hqq_cpp.transformers import _versions


@pytest.fixture
def warnings_of(monkeypatch):
    """Runs check() and returns its warnings."""

    def check(version):
        texts = []
        monkeypatch.setattr(_versions.logger, "warning", texts.append)
        _versions.check(version)
        return texts

    return check


@pytest.mark.parametrize("version", ("5.17.0", "5.20.2", "5.24.0", "5.24.1.dev0", "main"))
def test_tested_versions_of_transformers(warnings_of, version):
    assert warnings_of(version) == []


@pytest.mark.parametrize("version", ("4.57.6", "5.0.0", "5.10.0", "5.16.1"))
def test_older_ones_are_refused(version):
    with pytest.raises(ImportError) as caught:
        _versions.check(version)
    assert str(caught.value) == (
        f"hqq_cpp.transformers needs Transformers 5.17 to 5.24; {version} is installed: "
        "pip install 'transformers>=5.17,<5.25'"
    )


@pytest.mark.parametrize("version", ("5.25.0", "5.30.0.dev0", "6.0.0"))
def test_newer_ones_are_a_warning(warnings_of, version):
    (text,) = warnings_of(version)
    assert f"tested with Transformers 5.17 to 5.24; {version} is installed" in text


def test_a_loader_without_our_parts_is_one_sentence(monkeypatch):
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    with pytest.raises(
        ImportError, match="works with .* installed and differs .*rename_source_key"
    ):
        runpy.run_path(_versions.__file__)


def test_parts_of_the_loader_are_imported_in_one_place(repository):
    folder = repository / "python" / "hqq_cpp" / "transformers"
    private = re.compile(r"from transformers\.(core_model_loading|conversion_mapping|integrations)")
    users = {path.name for path in folder.rglob("*.py") if private.search(path.read_text())}
    assert users == {"_versions.py"}


def test_torch():
    for version in ("2.9.0", "2.13.0+cpu", "2.15.0", "3.0.0", "from source"):
        torch_versions.check(version)
    with pytest.raises(ImportError) as caught:
        torch_versions.check("2.4.1+cu121")
    assert str(caught.value) == (
        "hqq_cpp.nn needs torch 2.9 or newer; 2.4.1+cu121 is installed: pip install 'torch>=2.9'"
    )


def test_extras_and_pins_say_the_same(repository):
    extras = (repository / "pyproject.toml").read_text()
    oldest, newest = (".".join(map(str, v)) for v in (_versions.OLDEST, _versions.NEWEST))
    oldest_torch = ".".join(map(str, torch_versions.OLDEST))
    assert set(re.findall(r'"transformers([^"]*)"', extras)) == {f">={oldest},<6"}
    assert set(re.findall(r'"torch([^"]*)"', extras)) == {f">={oldest_torch}"}
    pins = (repository / "scripts" / "requirements-test.txt").read_text()
    assert re.search(rf"^transformers=={re.escape(newest)}\.", pins, re.MULTILINE)

"""The committed type stubs are those of the built module."""

import ast
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import hqq_cpp
from hqq_cpp import _core

STUBGEN = "3.0.0"
PYBIND11 = "3.1"
PACKAGE = "python/hqq_cpp"


def normalize(text):
    """Without trailing blanks, which the generator leaves in docstrings."""
    return [line.rstrip() for line in text.splitlines()]


@pytest.fixture(scope="module")
def committed(repository=Path(__file__).resolve().parents[3]):
    return repository / PACKAGE / "_core.pyi"


def test_stubs_are_current(committed, tmp_path):
    if importlib.util.find_spec("pybind11_stubgen") is None:
        pytest.skip(f"pybind11-stubgen {STUBGEN}, which generates the stubs, is not installed")
    if hasattr(types, "CapsuleType"):
        pytest.skip(
            "from Python 3.13 on the stubs would name types.CapsuleType, which older ones lack"
        )
    from importlib.metadata import version

    if version("pybind11-stubgen") != STUBGEN or _core._pybind11_version != PYBIND11:
        pytest.skip(
            f"the stubs are compared for pybind11-stubgen {STUBGEN} and pybind11 {PYBIND11}, not "
            f"{version('pybind11-stubgen')} and {_core._pybind11_version}"
        )
    command = [sys.executable, "-m", "pybind11_stubgen", "--exit-code", "hqq_cpp._core", "-o", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh = normalize((tmp_path / "hqq_cpp" / "_core.pyi").read_text())
    assert fresh == normalize(committed.read_text()), (
        "run: python -m pybind11_stubgen hqq_cpp._core -o python, "
        f"then: sed -i 's/ *$//' {PACKAGE}/_core.pyi"
    )


def test_stubs_name_everything(committed):
    """Holds without the generator: every public name of the module, and no other, has a stub."""
    tree = ast.parse(committed.read_text())
    stubs = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            stubs.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            stubs.add(node.target.id)
    assert stubs - {"__all__", "__version__", "_pybind11_version"} == {
        name for name in dir(_core) if not name.startswith("_")
    }


def test_stubs_know_no_any_where_a_type_is_known(committed):
    """A signature that pybind11 could not spell shows its C++ name."""
    assert not re.search(r"hqq::|std::|pybind11::", committed.read_text())


def test_the_package_is_marked_as_typed():
    package = Path(hqq_cpp.__file__).parent
    assert (package / "py.typed").exists() and (package / "_core.pyi").exists()

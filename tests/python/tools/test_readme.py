"""The examples of README.md run as they are printed, and print what it says. So do the commands of
docs/cli.md; the C++ of docs/cpp.md is that of programs in examples/."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest


def blocks(repository, language, page="README.md"):
    text = (repository / page).read_text()
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    assert found, f"{page} has no {language} block"
    return found


@pytest.fixture
def clone(repository, tmp_path):
    """A folder in which the paths of the examples mean what they mean in a clone."""
    shutil.copytree(repository / "examples" / "tiny-llama", tmp_path / "examples" / "tiny-llama")
    return tmp_path


@pytest.mark.parametrize("page", ("README.md", "docs/cli.md"))
def test_shell_examples(repository, clone, page):
    command = shutil.which(
        "hqq-cpp", path=os.path.dirname(sys.executable) + ":" + os.environ["PATH"]
    )
    if command is None:
        pytest.skip("hqq-cpp is not installed beside this Python")
    env = dict(os.environ, PATH=os.path.dirname(command) + ":" + os.environ["PATH"])
    for block in blocks(repository, "sh", page):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=clone,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (clone / "out" / "llama-dense" / "config.json").exists()


def test_the_output_of_the_first_example(repository, clone):
    code, (output,) = blocks(repository, "python")[0], blocks(repository, "text")
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert done.stdout == output


def test_python_examples(repository, clone):
    examples = blocks(repository, "python")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    runnable = [block for block in examples if not any(name in block for name in missing)]
    for block in runnable:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=clone, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    if len(runnable) < len(examples):
        pytest.skip(f"{len(examples) - len(runnable)} of {len(examples)} examples need {missing}")


def test_it_stays_short(repository):
    assert len((repository / "README.md").read_text().splitlines()) <= 130


# CTest builds and runs the programs.
def test_cpp_example_is_the_one_that_is_built(repository):
    assert blocks(repository, "cpp") == [
        (repository / "examples" / "quantize_matrix.cpp").read_text()
    ]


def test_cpp_page_quotes_programs_that_are_built(repository):
    *parts, engine = blocks(repository, "cpp", "docs/cpp.md")
    assert engine == (repository / "examples" / "small_engine.cpp").read_text()
    tour = (repository / "examples" / "library_tour.cpp").read_text()
    for part in parts:
        assert textwrap.indent(part, "  ") in tour

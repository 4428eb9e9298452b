"""scripts/check_docs.py finds what is wrong with a page, and nothing else."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest


@pytest.fixture
def check(repository, tmp_path):
    """Writes a page into a small repository; returns the problems of that page."""
    script = runpy.run_path(str(repository / "scripts" / "check_docs.py"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "src" / "io").mkdir(parents=True)
    (tmp_path / "docs" / "other.md").write_text(
        "# Other\n\n## The `hqq` [solver](a.md), twice\n\n## Twice\n\n## Twice\n\n```\n## Fenced\n```\n"
    )

    def problems(text):
        page = tmp_path / "docs" / "page.md"
        page.write_text(text, encoding="utf-8")
        return script["problems"](tmp_path, [page])

    return problems


@pytest.mark.parametrize(
    "text",
    (
        "# A page\n\n[other](other.md), [itself](#a-page), [elsewhere](https://example.com/a#b)\n",
        "[a](other.md#the-hqq-solver-twice), [b](other.md#twice), [c](other.md#twice-1)\n",
        "`src/io`, src/io/, `src/io/*.cpp`, `src/<name>.cpp`, build/src/none, `/src/none`\n",
        "`[not](a-link.md)` and ![an image](other.md)\n\n```\n[neither](this.md)\n```\n",
        "| " + "a table may be wide " * 10 + "|\n",
    ),
)
def test_a_page_without_problems(check, text):
    assert check(text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    (
        ("\n[a](none.md)\n", "2: the link none.md leads to no file"),
        ("[a](other.md#none)\n", "1: the link other.md#none leads to no heading"),
        ("[a](other.md#fenced)\n", "1: the link other.md#fenced leads to no heading"),
        ("[a](#twice-2)\n", "1: the link #twice-2 leads to no heading"),
        ("See `src/none.cpp`.\n", "1: the path src/none.cpp is not in the repository"),
        ("```\ncat src/none\n```\n", "2: the path src/none is not in the repository"),
        ("a" * 121 + "\n", "1: the line has 121 characters, at most 120 are allowed"),
        ("caf\u00e9\n", r"1: '\xe9' is not ASCII"),
    ),
)
def test_a_problem_is_one_line(check, text, problem):
    assert check(text) == [f"docs/page.md:{problem}"]


def test_the_command(repository, tmp_path):
    def run(text):
        page = tmp_path / "page.md"
        page.write_text(text)
        script = repository / "scripts" / "check_docs.py"
        return subprocess.run([sys.executable, script, page], capture_output=True, text=True)

    done = run("# A page\n")
    assert (done.returncode, done.stdout) == (0, "1 pages checked\n")
    done = run("[a](none.md)\n")
    assert done.returncode == 1
    assert done.stdout.endswith("page.md:1: the link none.md leads to no file\n")

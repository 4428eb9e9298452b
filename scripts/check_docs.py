#!/usr/bin/env python3
"""Checks the pages of the documentation.

    scripts/check_docs.py                  every page of the repository
    scripts/check_docs.py docs/cli.md ...  these pages

Every relative link leads to a file, every anchor to a heading, and every path that begins with a
folder of the repository exists. Lines have at most 120 characters, tables aside, all of them ASCII.
Prints one line for each problem and exits with 1 if there is any.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_LINE = 120
FOLDERS = [
    "benchmarks",
    "cmake",
    "cuda",
    "docs",
    "examples",
    "include",
    "python",
    "scripts",
    "src",
    "tests",
]
PAGES = ("*.md", *(f"{folder}/**/*.md" for folder in FOLDERS))

CODE_SPAN = re.compile(r"`[^`]*`")
FENCE = re.compile(r"^ *```")
HEADING = re.compile(r"^#+ +(.*)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A path, together with what would make it a pattern or a placeholder.
PATH = re.compile(rf"(?<![\w/.$~-])(?:{'|'.join(FOLDERS)})/[\w./*{{}}<>$-]+")
PATTERN = re.compile(r"[*{}<>$]")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = LINK.sub(lambda link: link.group()[1:].split("]")[0], heading).lower().strip()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of what is not inside a fenced block."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


def anchors(page: Path) -> set[str]:
    found: dict[str, int] = {}
    for _, line in prose(page.read_text(encoding="utf-8")):
        if heading := HEADING.match(line):
            name = slug(heading.group(1))
            found[name] = found.get(name, -1) + 1
    return {f"{name}-{n}" if n else name for name, count in found.items() for n in range(count + 1)}


def link_problem(page: Path, target: str) -> str | None:
    """What is wrong with a link of `page`, or None."""
    if re.match(r"[a-z]+:", target):
        return None
    file, _, anchor = target.partition("#")
    path = page.parent / file if file else page
    if not path.exists():
        return f"the link {target} leads to no file"
    if anchor and anchor not in anchors(path):
        return f"the link {target} leads to no heading"
    return None


def page_problems(page: Path, root: Path) -> Iterator[tuple[int, str]]:
    text = page.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > MAX_LINE and not line.lstrip().startswith("|"):
            yield number, f"the line has {len(line)} characters, at most {MAX_LINE} are allowed"
        if not line.isascii():
            yield number, f"{next(c for c in line if not c.isascii())!a} is not ASCII"
        for path in (found.rstrip(".-") for found in PATH.findall(line)):
            exists = (root / path).exists() or (page.parent / path).exists()
            if not exists and not PATTERN.search(path):
                yield number, f"the path {path} is not in the repository"
    for number, line in prose(text):
        for target in LINK.findall(CODE_SPAN.sub("", line)):
            if problem := link_problem(page, target):
                yield number, problem


def problems(root: Path, pages: Iterable[Path]) -> list[str]:
    """A line "page:number: what is wrong" for each problem."""
    return [
        f"{os.path.relpath(page, root)}:{number}: {problem}"
        for page in pages
        for number, problem in sorted(page_problems(page, root))
    ]


def main(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    named = [Path(argument).resolve() for argument in arguments]
    pages = named or sorted({page for pattern in PAGES for page in root.glob(pattern)})
    found = problems(root, pages)
    print("\n".join(found) if found else f"{len(pages)} pages checked")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

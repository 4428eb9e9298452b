#!/usr/bin/env python3
"""Files and functions that have grown too long: python scripts/check_sizes.py [FOLDER].

Files have at most 450 lines, functions at most 70. Tests count by file only.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE = 450
MAX_FUNCTION = 70
CPP = {".cpp", ".hpp", ".h", ".cu"}
# Generated, and one long table.
EXEMPT = {"python/hqq_cpp/_core.pyi"}

# Text in which braces mean nothing.
_CPP_TEXT = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.DOTALL
)
# A brace after one of these opens a scope of declarations, not the body of a function.
_SCOPE = re.compile(r"(?:^|[;{}\s])(?:namespace|class|struct|union|enum|extern)\b[^;(){}=]*$")


def blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def cpp_functions(text: str) -> Iterator[tuple[int, int]]:
    """First and last line of every body outside of other bodies."""
    text = _CPP_TEXT.sub(blank, text)
    text = re.sub(r"^\s*#.*?(?<!\\)$", blank, text, flags=re.MULTILINE | re.DOTALL)
    scopes: list[bool] = []  # whether each open brace belongs to a scope
    start = declared = 0
    for at in (m.start() for m in re.finditer(r"[{};]", text)):
        if text[at] == "{":
            is_scope = all(scopes) and bool(_SCOPE.search(text[declared:at]))
            if all(scopes) and not is_scope:
                head = text[declared:at]
                start = declared + len(head) - len(head.lstrip())
            scopes.append(is_scope)
        elif text[at] == "}" and scopes:
            if not scopes.pop() and all(scopes) and ")" in text[start : text.index("{", start)]:
                yield text.count("\n", 0, start) + 1, text.count("\n", 0, at) + 1
        if all(scopes):
            declared = at + 1


def python_functions(text: str) -> Iterator[tuple[int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            yield node.lineno, node.end_lineno


def problems(root: Path) -> Iterator[str]:
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True
    )
    for name in sorted(names.stdout.split("\n")):
        path = root / name
        if path.suffix not in CPP | {".py"} or name in EXEMPT or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        count = text.count("\n")
        if count > MAX_FILE:
            yield f"{name}: {count} lines; a file has at most {MAX_FILE}"
        if name.startswith("tests/"):
            continue
        functions = python_functions(text) if path.suffix == ".py" else cpp_functions(text)
        for first, last in functions:
            if last - first >= MAX_FUNCTION:
                length = last - first + 1
                yield f"{name}:{first}: {length} lines; a function has at most {MAX_FUNCTION}"


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    found = list(problems(root))
    print("\n".join(found) or "-- sizes: all files and functions are short enough")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

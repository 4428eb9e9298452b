"""The console script hqq-cpp: the same C++ code as the binary."""

from __future__ import annotations

import os
import sys

from . import _core


def main() -> int:
    """Runs the command with sys.argv. Returns its exit code (docs/cli.md)."""
    # Bytes that are no UTF-8 come back as they were.
    argv = [os.fsencode(argument) for argument in sys.argv]
    return _core.cli_main(argv)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())

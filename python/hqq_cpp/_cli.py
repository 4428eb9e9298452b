"""The console script hqq-cpp: the C++ code of the binary, and the commands that need torch."""

from __future__ import annotations

import argparse
import os
import sys

from . import _core
from .errors import FormatError

# docs/cli.md
_USER_ERROR, _FORMAT_ERROR, _SYSTEM_ERROR = 2, 3, 4
_IMPORTANCE = "importance"


def main() -> int:
    """Runs the command with sys.argv. Returns its exit code (docs/cli.md)."""
    if sys.argv[1:2] == [_IMPORTANCE]:
        return _importance(sys.argv[2:])
    # Bytes that are no UTF-8 come back as they were.
    argv = [os.fsencode(argument) for argument in sys.argv]
    return _core.cli_main(argv)  # type: ignore[arg-type]


def _importance(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"hqq-cpp {_IMPORTANCE}",
        description="Writes the importance of the input columns of every layer of a model, from "
        "one pass over random "
        "tokens: a file for hqq-cpp quantize --importance. One decoder layer is in memory at a "
        "time.",
        epilog="Needs torch and Transformers.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder with the float model")
    parser.add_argument("out", metavar="OUT", help="safetensors file to write")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="how many (512)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the random tokens (0)")
    args = parser.parse_args(arguments)
    try:
        from .importance.folder import collect_importance_folder

        result = collect_importance_folder(args.model_dir, args.out, n=args.tokens, seed=args.seed)
    except FormatError as error:
        return _report(error, _FORMAT_ERROR)
    except OSError as error:
        return _report(error, _SYSTEM_ERROR)
    except (ImportError, ValueError) as error:
        return _report(error, _USER_ERROR)
    print(f"{args.out}: importance of {len(result)} layers")
    return 0


def write_qmodel(folder: str) -> tuple[int, str]:
    """What `hqq-cpp convert --to upstream` calls for hqq's own loader.

    Returns:
        (exit code, message): of an error, or why the file was not written.
    """
    try:
        from .transformers.qmodel import write_qmodel as write
    except ImportError as error:
        return 0, f"it needs torch and Transformers ({error})"
    try:
        write(folder)
    except OSError as error:
        return _SYSTEM_ERROR, str(error)
    except (RuntimeError, ValueError) as error:
        return 0, str(error).strip().splitlines()[0]
    return 0, ""


def _report(error: Exception, code: int) -> int:
    print(f"hqq-cpp: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

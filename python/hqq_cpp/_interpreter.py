"""Refuses sub-interpreters, in which the C++ part cannot be loaded."""

from __future__ import annotations

import importlib

__all__ = ["refuse_sub_interpreter"]


def refuse_sub_interpreter() -> None:
    """Raises ImportError unless this is the main interpreter.

    Before Python 3.12 nobody asks a module whether it can live in a sub-interpreter, and pybind11 waits
    for ever for the GIL while it is loaded.

    Example:
        >>> from hqq_cpp._interpreter import refuse_sub_interpreter
        >>> refuse_sub_interpreter()
    """
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        current, main = interpreters.get_current(), interpreters.get_main()
        # Python 3.13 gives (id, who created it), older ones an object of the id.
        if current != main:
            raise ImportError(
                "[hqq_cpp] it cannot be imported in a sub-interpreter; import it in the main "
                "interpreter, or use processes"
            )
        return

"""functools.cache, with the types of the function kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["cached"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def cached(function: _Function) -> _Function:
    """Remembers the results of a function. Its arguments must be hashable.

    Example:
        >>> from hqq_cpp._cached import cached
        >>> @cached
        ... def squared(x: int) -> int:
        ...     return x * x
        >>> squared(3), squared(3)
        (9, 9)
    """
    return cast(_Function, functools.cache(function))

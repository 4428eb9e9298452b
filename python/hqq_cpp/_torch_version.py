"""Which versions of torch work."""

from __future__ import annotations

import re

import torch

OLDEST = (2, 9)


def check(installed: str) -> None:
    """Whether hqq_cpp.nn works with a version of torch.

    Raises:
        ImportError: For one that is too old.
    """
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"hqq_cpp.nn needs torch {oldest} or newer; {installed} is installed: "
            f"pip install 'torch>={oldest}'"
        )


check(torch.__version__)

"""Whether weight files are those of a dense model. The rule is in src/io/checkpoint/quantized_source.cpp."""

from __future__ import annotations

import os
from collections.abc import Iterable

from . import _core


def check_dense_source(files: Iterable[str | os.PathLike[str]], where: str) -> None:
    """Refuses files that are quantized already, whether they, a config.json beside them or another
    file of that folder says so. What cannot be read is passed over, since its reader tells.

    Args:
        files: Weight files, all of one folder.
        where: For the message: what needs the dense model.

    Raises:
        ValueError: Naming what was found.
    """
    paths = [os.fspath(file) for file in files]
    found = _core.find_quantization(paths)
    if found:
        folder = os.path.dirname(paths[0])
        raise ValueError(
            f"[{where}] {folder!r} is already quantized: {found}; an unquantized checkpoint is "
            "needed"
        )

"""Run by hqq_cpp.pth whenever Python starts; imports hqq_cpp once Transformers or diffusers
looks for quantizers.

docs/transformers.md says what for, and how to switch it off.
"""

import sys

_WANTED = ("transformers.quantizers", "diffusers.quantizers")


class _ImportBefore:
    """Finds nothing; sees which module is about to be imported."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname not in _WANTED:
            return
        try:
            sys.meta_path.remove(cls)
        except ValueError:  # another thread was faster
            return
        try:
            import hqq_cpp  # noqa: F401
        except Exception as error:
            import warnings

            warnings.warn(
                "[hqq_cpp] cannot be imported, so folders that it quantized will not load: "
                f"{error}",
                stacklevel=2,
            )


sys.meta_path.insert(0, _ImportBefore)

"""Calls functions as soon as a module of another package is imported."""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["after_import"]

_callbacks: dict[str, list[Callable[[], None]]] = {}
# Names whose import was not seen yet.
_waiting: set[str] = set()


def after_import(module_name: str, callback: Callable[[], None]) -> None:
    """Calls ``callback`` now if the module is imported, otherwise at the end of its import.

    It is called again after a reload, and must not mind. An exception of it becomes a warning:
    the import of the other package does not fail because of us.

    Args:
        module_name: Full name, such as ``"peft"`` or ``"transformers.quantizers.auto"``. The
            module does not have to exist.
        callback: A function without arguments. Asking twice for the same one changes nothing.

    Example:
        >>> from hqq_cpp._after_import import after_import
        >>> after_import("sys", lambda: print("is here"))
        is here
    """
    callbacks = _callbacks.setdefault(module_name, [])
    if callback in callbacks:
        return
    callbacks.append(callback)
    if not any(finder is _finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _finder)
    if _is_imported(module_name):
        _call(module_name, callback)
    else:
        _waiting.add(module_name)


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


def _call(name: str, callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception as error:
        import warnings

        warnings.warn(
            f"[hqq_cpp] {name} was imported, but hqq_cpp could not be registered with it: "
            f"{type(error).__name__}: {error}",
            stacklevel=3,
        )


def _call_all(name: str) -> None:
    _waiting.discard(name)
    for callback in tuple(_callbacks.get(name, ())):
        _call(name, callback)


def _call_late() -> None:
    """For modules that came without our finder: begun before it was there, or found by others."""
    for name in tuple(_waiting):
        if _is_imported(name):
            try:
                _waiting.remove(name)
            except KeyError:  # another thread was faster
                continue
            _call_all(name)


class _Finder:
    """Lets the other finders find a module, and puts our part at the end of its execution."""

    def __init__(self) -> None:
        self._busy: set[tuple[int, str]] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if _waiting:
            _call_late()
        # A finder that asks the whole of sys.meta_path comes back to here.
        key = (_thread.get_ident(), fullname)
        if fullname not in _callbacks or key in self._busy:
            return None
        self._busy.add(key)
        try:
            spec = self._find_by_others(fullname, path, target)
        finally:
            self._busy.discard(key)
        if hasattr(getattr(spec, "loader", None), "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec

    def _find_by_others(self, fullname: str, path: Any, target: Any) -> Any:
        for finder in tuple(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _Loader:
    """Stands before the loader of one module until that is executed."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        create = getattr(self._loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: Any) -> None:
        # Whoever asks a module for its loader (inspect, importlib.resources) gets the real one.
        module.__spec__.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        _call_all(module.__spec__.name)


_finder = _Finder()

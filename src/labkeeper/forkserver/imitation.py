"""An imitation of a kernel, for libraries that are imported before there is one.

Some only look what they are imported by: pandas shows fewer columns in a kernel than on a terminal.
They find what a kernel would show them. Others use their kernel, or keep it; that is noticed.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class Imitation:
    """What stands for the kernel, its shell, its application's configuration, and `__main__`."""

    def __init__(self, shell_class: type) -> None:
        """Take the class that the shell seems to be of."""
        self.used: list[str] = []
        """What was used of them, beyond a look."""
        self._kernel = _Thing("kernel", self.used)
        self._config = {"IPKernelApp": {"connection_file": "kernel.json"}}
        self.shell = _Shell(self._kernel, self._config, shell_class, self.used)
        self.main = types.ModuleType("__main__")
        self._references: list[int] = []

    def watch(self) -> None:
        """Count references from now on; it is in its place."""
        self._references = self._counted()

    def unfit(self) -> bool:
        """Return whether any was used, or is referred to by now."""
        if self._counted() != self._references:
            # Perhaps by garbage.
            gc.collect()
        return bool(self.used) or self._counted() != self._references

    def _counted(self) -> list[int]:
        things = (self.shell, self._kernel, self._config, self.main, vars(self.main))
        return [sys.getrefcount(each) for each in things]


class _Thing:
    def __init__(self, name: str, used: list[str]) -> None:
        self._name, self._used = name, used

    def __getattr__(self, name: str) -> Any:
        self._used.append(f"{self._name}.{name}")
        raise AttributeError(f"a kernel that is only imitated has no {name}")


class _Shell(_Thing):
    def __init__(self, kernel: Any, config: Any, shell_class: type, used: list[str]) -> None:
        super().__init__("shell", used)
        self.kernel, self.config, self._class = kernel, config, shell_class

    # Also for `isinstance`.
    __class__ = property(lambda self: self._class)


@contextlib.contextmanager
def imitated_kernel(kernel_env: Mapping[str, str], argv: Sequence[str]) -> Iterator[Imitation]:
    """Show modules that are imported in the block what they would find in a kernel.

    `kernel_env` are the variables that a kernel sets for itself, `argv` is its command line.
    """
    from ipykernel.zmqshell import ZMQInteractiveShell

    imitation = Imitation(ZMQInteractiveShell)
    environment, arguments, main = dict(os.environ), list(sys.argv), sys.modules["__main__"]
    with _singletons(imitation), _names(imitation), _encoding():
        try:
            sys.modules["__main__"] = imitation.main
            sys.argv[:] = argv
            os.environ.update(kernel_env)
            imitation.watch()
            yield imitation
        finally:
            os.environ.clear()
            os.environ.update(environment)
            sys.argv[:] = arguments
            sys.modules["__main__"] = main


@contextlib.contextmanager
def _singletons(imitation: Imitation) -> Iterator[None]:
    """Answer who asks for the shell; note who asks for the kernel or its application."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import SingletonConfigurable

    def initialized(kind: Any) -> bool:
        if issubclass(kind, InteractiveShell):
            return True
        imitation.used.append(kind.__name__)
        return False

    kinds: Any = SingletonConfigurable
    shells: Any = InteractiveShell
    usual = kinds.__dict__["initialized"]
    kinds.initialized = classmethod(initialized)
    shells.instance = classmethod(lambda *_, **__: imitation.shell)
    try:
        yield
    finally:
        kinds.initialized = usual
        del shells.instance


@contextlib.contextmanager
def _encoding() -> Iterator[None]:
    """Give standard output the encoding that it has in a kernel: pandas copies it to an option."""
    stream: Any = sys.stdout
    usual = {"encoding": stream.encoding, "errors": stream.errors}
    stream.reconfigure(encoding="UTF-8", errors=stream.errors)
    try:
        yield
    finally:
        stream.reconfigure(**usual)


@contextlib.contextmanager
def _names(imitation: Imitation) -> Iterator[None]:
    """Define the names that a kernel adds to Python's own."""
    added: Any = builtins
    added.get_ipython, added.__IPYTHON__ = lambda: imitation.shell, True
    try:
        yield
    finally:
        del added.get_ipython, added.__IPYTHON__

"""Which environment variables modules read when they are imported.

A kernel with other values must not be forked from a process that has imported them, unless what
they made of the variable is renewed (see `renewal`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

Readings = dict[str, set[str]]
"""The top-level modules that read a variable, by its name; the standard library counts as its
caller."""

_BY_JUPYTER = {"JPY_PARENT_PID", "JPY_SESSION_NAME", "KERNEL_ID"}
"""Variables that differ between kernels by their nature."""
_RENEWED = _BY_JUPYTER | {"HOME", "PATH", "USER"}
"""Variables whose use by the modules of a plain kernel is renewed, or by the kernel itself."""
_RENEWED_BY = {"matplotlib": {"HOME"}}
"""Variables whose use by a library is renewed."""


@contextlib.contextmanager
def recorded() -> Iterator[Readings]:
    """Record the variables that are read in the block."""
    readings: Readings = {}
    # Its class is changed, not replaced: IPython keeps `type(os.environ)`, to show it well.
    kind: Any = type(os.environ)
    usual = kind.__getitem__

    def read(variables: Any, name: Any) -> Any:
        readings.setdefault(os.fsdecode(name), set()).add(_reader())
        return usual(variables, name)

    kind.__getitem__ = read
    try:
        yield readings
    finally:
        kind.__getitem__ = usual


def that_matter(readings: Readings) -> set[str]:
    """Return the variables that a plain kernel must have the same value of."""
    return readings.keys() - _RENEWED


def that_matter_to_libraries(readings: Readings) -> set[str]:
    """Return the same for libraries."""
    return {
        name
        for name, readers in readings.items()
        if name not in _BY_JUPYTER
        and any(name not in _RENEWED_BY.get(reader, ()) for reader in readers)
    }


def _reader() -> str:
    frame: Any = sys._getframe(2)  # noqa: SLF001 - as `warnings` and `logging` find their callers
    while frame is not None:
        top = str(frame.f_globals.get("__name__")).partition(".")[0]
        if top not in _STANDARD:
            return top
        frame = frame.f_back
    return ""


_STANDARD = {
    __name__.partition(".")[0],
    *getattr(sys, "stdlib_module_names", ()),  # Python 3.9 has none: then the reader is unknown.
    "_frozen_importlib",
    "_frozen_importlib_external",
}

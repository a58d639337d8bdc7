"""Command lines of the programs that load ipykernel, and of kernels."""

from __future__ import annotations

import os
from collections.abc import Sequence

LAUNCHER = "ipykernel_launcher"
"""The module that a kernel executes."""
FROZEN_MODULES_OFF = "-Xfrozen_modules=off"
"""The option without which the debugger warns, and which some kernelspecs have therefore."""
_TITLE_SPACE = " " * 400
"""An argument that reserves space: a kernel shows its own command line there."""


def loading(
    python: str, options: Sequence[str], mode: str, descriptor: int, libraries: Sequence[str]
) -> list[str]:
    """Return the command line of a program that loads ipykernel and libraries, and serves a socket.

    `mode` is that of `__main__`.
    """
    program = [os.path.dirname(__file__), mode, str(descriptor), ",".join(libraries), _TITLE_SPACE]
    return [python, *options, FROZEN_MODULES_OFF, *program]


def executing(python: str, options: Sequence[str] = ()) -> list[str]:
    """Return the command line of a kernel, without its arguments."""
    return [python, *options, FROZEN_MODULES_OFF, "-m", LAUNCHER]

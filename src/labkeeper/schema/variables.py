"""Environment variables that callers may set for servers and kernels: names and sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

VARIABLE: Final = r"[A-Za-z_][A-Za-z0-9_]{0,127}"
"""Pattern of a name."""
_OURS: Final = re.compile(r"LABKEEPER_|JUPYTER_RUNTIME_DIR$|JUPYTER_TOKEN|JUPYTER_GATEWAY_")
"""Names that request fields cover."""
_LOADING: Final = re.compile(
    # Linker and C library: code loaded into every program before its first instruction.
    r"LD_|DYLD_|GCONV_PATH$|GLIBC_TUNABLES$|LOCPATH$|MALLOC_TRACE$|OPENSSL_"
    # Interpreters: code run before, or instead of, the requested code.
    r"|PYTHON|IPYTHON|BASH_ENV$|ENV$|PROMPT_COMMAND$|NODE_|PERL|RUBY|(_JAVA|JAVA_TOOL|JDK_JAVA)_OPTIONS$|CLASSPATH$"
    # Jupyter: its configuration is Python code, by default below HOME or an XDG directory.
    r"|JUPYTER|HOME$|XDG_"
    # Kernels, terminals and extensions run programs by name, or the one named here.
    r"|PATH$|SHELL$|GIT_(SSH|ASKPASS|EDITOR|PAGER|EXEC_PATH|EXTERNAL_DIFF|PROXY_COMMAND|CONFIG)"
)
"""Names that load code other than what the operator installed. Anyone who may open a Lab runs code
in it anyway, but this code would run in Jupyter's own process, and in an executed one before its
limits apply. No list is complete."""
_LARGEST: Final = 128 * 1024
"""Bytes of one `NAME=value` with its final NUL; Linux executes nothing with a longer one
(MAX_ARG_STRLEN)."""
_LARGEST_OF_ALL: Final = 256 * 1024
"""Bytes of all variables: a new program gets a quarter of the stack limit (mostly 2 MiB) for its
environment and arguments, which the keeper's own variables and command lines share."""


def check_env(env: dict[str, str]) -> dict[str, str]:
    """Return a server's variables. Raises ValueError with the rule that a name breaks."""
    for name in env:
        if not re.fullmatch(VARIABLE, name):
            raise ValueError(
                f"bad name {name[:40]!r}: must be letters, digits and '_', "
                "not beginning with a digit"
            )
        if _OURS.match(name):
            raise ValueError(
                f"name {name!r} belongs to labkeeper; use the fields of the request instead"
            )
    return env


def check_kernel_env(env: dict[str, str]) -> dict[str, str]:
    """Return kernel variables. Raises ValueError with the rule that a name breaks."""
    if "KERNEL_ID" in env:
        raise ValueError("'KERNEL_ID' would give every kernel the same id")
    return check_env(env)


def loading(names: Iterable[str]) -> list[str]:
    """Return those names that load code."""
    return [name for name in names if _LOADING.match(name)]


def check_sizes(*environments: Mapping[str, str]) -> None:
    """Check that a process can be started with all of these. Raises ValueError with the rule."""
    sizes = [
        len(f"{name}={value}".encode()) + 1
        for variables in environments
        for name, value in variables.items()
    ]
    if max(sizes, default=0) > _LARGEST or sum(sizes) > _LARGEST_OF_ALL:
        raise ValueError(
            f"env and kernel_env: must be at most {_LARGEST_OF_ALL} bytes together, "
            f"and each variable at most {_LARGEST}"
        )

"""Environment variables that callers may give to servers and kernels: which, and how much of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

VARIABLE: Final = r"[A-Za-z_][A-Za-z0-9_]{0,127}"
"""What a name looks like."""
_OURS: Final = re.compile(r"LABKEEPER_|JUPYTER_RUNTIME_DIR$|JUPYTER_TOKEN|JUPYTER_GATEWAY_")
"""Names of what the fields of a request say."""
_LOADING: Final = re.compile(
    # The linker and the C library: what is loaded into every program, before its first instruction.
    r"LD_|DYLD_|GCONV_PATH$|GLIBC_TUNABLES$|LOCPATH$|MALLOC_TRACE$|OPENSSL_"
    # Interpreters: what they run before, or in place of, what they were asked to.
    r"|PYTHON|IPYTHON|BASH_ENV$|ENV$|PROMPT_COMMAND$|NODE_|PERL|RUBY|(_JAVA|JAVA_TOOL|JDK_JAVA)_OPTIONS$|CLASSPATH$"
    # Jupyter: its configuration is Python code, below HOME or an XDG directory where no variable of its own says otherwise.
    r"|JUPYTER|HOME$|XDG_"
    # Kernels, terminals and extensions run programs by name, or the one that is named here.
    r"|PATH$|SHELL$|GIT_(SSH|ASKPASS|EDITOR|PAGER|EXEC_PATH|EXTERNAL_DIFF|PROXY_COMMAND|CONFIG)"
)
"""Names by which other code is loaded than whoever runs this machine has put there. Who may open a Lab runs code in it all
the same; but this would run in Jupyter's own process, and in an executed one before its limits hold. No list is complete."""
_LARGEST: Final = 128 * 1024
"""Bytes of one `NAME=value` with the NUL at its end: Linux starts no program with a longer one (MAX_ARG_STRLEN)."""
_LARGEST_OF_ALL: Final = 256 * 1024
"""Bytes of all of them: a quarter of the stack's limit is all that a new program gets for its environment and arguments, and most
often that is 2 MiB, of which the keeper's own variables and command lines need their part."""


def check_env(env: dict[str, str]) -> dict[str, str]:
    """Give variables for a server back. Raises ValueError with the rule that a name breaks."""
    for name in env:
        if not re.fullmatch(VARIABLE, name):
            raise ValueError(f"bad name {name[:40]!r}: must be letters, digits and '_', not beginning with a digit")
        if _OURS.match(name):
            raise ValueError(f"name {name!r} belongs to labkeeper; use the fields of the request instead")
    return env


def check_kernel_env(env: dict[str, str]) -> dict[str, str]:
    """Give variables for kernels back, likewise."""
    if "KERNEL_ID" in env:
        raise ValueError("'KERNEL_ID' would give every kernel the same id")
    return check_env(env)


def loading(names: Iterable[str]) -> list[str]:
    """Return those names by which code is loaded."""
    return [name for name in names if _LOADING.match(name)]


def check_sizes(*environments: Mapping[str, str]) -> None:
    """Check that a process can be started with all these. Raises ValueError with the rule."""
    sizes = [len(f"{name}={value}".encode()) + 1 for variables in environments for name, value in variables.items()]
    if max(sizes, default=0) > _LARGEST or sum(sizes) > _LARGEST_OF_ALL:
        raise ValueError(
            f"env and kernel_env: must be at most {_LARGEST_OF_ALL} bytes together, and each variable at most {_LARGEST}"
        )

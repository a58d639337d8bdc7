"""Environment variables that callers may give to servers and kernels: which, and how much of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

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


def loading(names: Iterable[str]) -> list[str]:
    """Give those names by which code is loaded."""
    return [name for name in names if _LOADING.match(name)]


def check_sizes(*environments: Mapping[str, str]) -> None:
    """Check that a process can be started with all these. Raises ValueError with the rule."""
    sizes = [len(f"{name}={value}".encode()) + 1 for variables in environments for name, value in variables.items()]
    if max(sizes, default=0) > _LARGEST or sum(sizes) > _LARGEST_OF_ALL:
        raise ValueError(
            f"env and kernel_env: must be at most {_LARGEST_OF_ALL} bytes together, and each variable at most {_LARGEST}"
        )

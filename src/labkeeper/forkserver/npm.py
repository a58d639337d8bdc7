"""The directory of npm's global packages, for which npm is asked once, in a rehearsal.

Language servers may be installed there, so jupyter_lsp asks for it: `npm prefix -g` takes about
0.1 s of CPU time. Servers take the answer over from their fork server, unless something may have
configured another one for them: https://docs.npmjs.com/cli/configuring-npm/npmrc
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

prefixes: dict[str, str] = {}
"""Answers, by npm's and Node's files; reported by a rehearsal to the fork server."""
_VARIABLES = {"PREFIX", "DESTDIR"}
"""Environment variables that npm reads, besides its own (`npm_config_*`)."""
_OPTIONS = (b"prefix", b"globalconfig")
"""Options in a file `npmrc` that change the answer."""
_SCRIPT = "npm-cli.js"
"""npm's own file; a version manager's stand-in has another name, and decides each time."""


def global_prefix(ask: Callable[[], str | None]) -> str | None:
    """Return npm's prefix, as known or by asking npm; None if npm fails."""
    script, node = (os.path.realpath(shutil.which(name) or "") for name in ("npm", "node"))
    if os.path.basename(script) != _SCRIPT or _is_configured(script, node):
        return ask()
    files = f"{script}:{node}"
    if files not in prefixes and (answer := ask()):
        prefixes[files] = answer
    return prefixes.get(files)


def _is_configured(script: str, node: str) -> bool:
    """Return whether the environment or a file may set the prefix."""
    if any(name in _VARIABLES or name.lower().startswith("npm_config_") for name in os.environ):
        return True
    files = (
        os.path.expanduser("~/.npmrc"),
        os.path.join(os.path.dirname(os.path.dirname(node)), "etc", "npmrc"),
        os.path.join(os.path.dirname(os.path.dirname(script)), "npmrc"),
        "/etc/npmrc",  # Debian's own.
    )
    return any(option in text for text in map(_text, files) for option in _OPTIONS)


def _text(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError:
        # Perhaps npm can read it.
        return _OPTIONS[0]

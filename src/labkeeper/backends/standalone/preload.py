"""What a fork server loads before it serves, and how it knows that this is still what is on disk.

A rehearsal tells what to load: a child initialises a whole server, with the site's own configuration and extensions, reports
every module that this took, and ends. Nothing has to be listed by anybody.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import os
import re
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Collection
from typing import Any, Optional

from . import pages
from .child import mark, run_jupyter
from .wire import Launch

REHEARSAL_SECONDS = 60
"""Seconds after which a rehearsal that has not ended is given up."""
_PROOF_PATHS = ("api", "api/me")
"""What a keeper asks before it calls a server running."""
_FIRST_PATHS = ("lab", "api/kernelspecs", "api/contents")
"""What a user's browser asks first; answering loads more modules."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
_CONFIG_FILES = tuple(f"jupyter_{what}config.{kind}" for what in ("", "server_", "lab_") for kind in ("py", "json"))
_MOST_PATTERNS = 400
"""Regular expressions that are compiled ahead; Python keeps at most 512."""


class PreloadError(Exception):
    """Servers cannot be forked from this process; says why."""


def load(launch: Launch, avoid: Collection[str]) -> set[str]:
    """Load what a server takes, but the modules to `avoid` and those in them; give those that must not be loaded before a fork.

    Where that is not empty this process is spoiled: it has a thread, or an open poll, socket or pipe that it would share with
    its children. Raises PreloadError.
    """
    importlib.import_module("jupyterlab.labapp")
    ours = _shared_things()
    told = _rehearse(launch)
    # Packages before what is in them: importing a module imports its package, so the one that spoils is found by its own name.
    for name in sorted(told["modules"], key=lambda name: name.count(".")):
        if name in sys.modules or any(f"{name}.".startswith(f"{avoided}.") for avoided in avoid):
            continue
        try:
            importlib.import_module(name)
        except BaseException as error:
            # Servers import it themselves, as one did in the rehearsal.
            print(f"[labkeeper] cannot preload {name}: {error!r}", file=sys.stderr, flush=True)
        if _shared_things() - ours:
            return {name}
    for pattern in told["patterns"][:_MOST_PATTERNS]:
        re.compile(*pattern)
    return set()


def written_pages(launch: Launch) -> list[tuple[int, int]]:
    """Give the pages of this process that a server writes to while it starts; a second rehearsal tells. Raises PreloadError."""
    return [(address, size) for address, size in _rehearse(launch)["pages"]]


def _shared_things() -> set[str]:
    """Name what a child would share with this process and must not: threads, and open things that are more than a file."""
    things = {f"thread {thread}" for thread in os.listdir("/proc/self/task")}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if not target.startswith("/"):
            things.add(target)
    return things


def _rehearse(launch: Launch) -> dict[str, Any]:
    """Run a whole server in a child, in a directory of its own; give what it took: modules, regular expressions, pages."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _perform(launch, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        report = stream.read()
    _, status = os.waitpid(pid, 0)
    try:
        return dict(json.loads(report))
    except ValueError:
        raise PreloadError(
            "the rehearsal of a server failed "
            f"({'signal' if os.WIFSIGNALED(status) else 'exit code'} "
            f"{os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)}); see the fork server's log"
        ) from None


def _perform(launch: Launch, writer: int) -> None:
    code = 1
    try:
        shared = pages.writable()
        # It ends with its parent, and it is known by its mark.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.alarm(REHEARSAL_SECONDS)
        os.setsid()
        mark(launch.room)
        os.environ.update(launch.env)
        os.chdir(launch.cwd)
        config = dict(launch.config)
        token = secrets.token_hex(24)
        config["IdentityProvider"] = {"token": token}

        def ready(app: Any) -> None:
            app.io_loop.add_callback(_warm_and_tell, app, token, shared, writer)

        run_jupyter(config, ready)
        code = 0
    except SystemExit as end:
        code = 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


async def _warm_and_tell(app: Any, token: str, shared: list[tuple[int, int]], writer: int) -> None:
    info = app.server_info()
    for path in _PROOF_PATHS:
        await _get(info, path, token)
    told: dict[str, Any] = {"pages": pages.copied(shared)}
    for path in _FIRST_PATHS:
        await _get(info, path, token)
    told["modules"] = [name for name in list(sys.modules) if not name.startswith(("labkeeper_standalone", "__m"))]
    # Where and how Python keeps what it has compiled is not promised: elsewhere there is nothing to take.
    told["patterns"] = [key[1:] for key in getattr(re, "_cache", ()) if isinstance(key, tuple) and key[:1] == (str,)]
    with os.fdopen(writer, "w") as report:
        json.dump(told, report)
    app.stop()


async def _get(info: dict[str, Any], path: str, token: str) -> None:
    reader, stream = await asyncio.open_connection("127.0.0.1", info["port"])
    stream.write(f"GET {info['base_url']}{path} HTTP/1.0\r\nHost: 127.0.0.1\r\nAuthorization: token {token}\r\n\r\n".encode())
    await reader.read()
    stream.close()


class Freshness:
    """Whether what this process has loaded is still what a new process would load."""

    def __init__(self) -> None:
        """Look at what is there now; call `settle` when all is loaded."""
        self._since = time.time_ns()
        self._known = {path: _stamp(path) for path in self._places()}

    def settle(self) -> Optional[str]:
        """Take in the files of all modules; name one that has changed while they were loaded, if any has."""
        changed = self.changed()
        files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        stamps = {path: _stamp(path) for path in files if path}
        self._known = {**stamps, **self._known}
        # It may have been written before it was loaded, or after. A time that is still to come says nothing.
        young = (path for path, stamp in stamps.items() if stamp and self._since < stamp[0] <= time.time_ns())
        return changed or next(young, None)

    def changed(self) -> Optional[str]:
        """Name one place that has changed since; None when all is as it was. Takes about 4 ms."""
        return next((path for path, stamp in self._known.items() if _stamp(path) != stamp), None)

    @staticmethod
    def _places() -> list[str]:
        """Name the directories in which packages and configuration are installed, and the interpreter."""
        from jupyter_core.paths import jupyter_config_path

        config = [
            found
            for directory in jupyter_config_path()
            for found in (
                *(os.path.join(directory, name) for name in _CONFIG_FILES),
                *_files_in(os.path.join(directory, "jupyter_server_config.d")),
            )
        ]
        lists = [file for place in sys.path for file in _files_in(place) if file.endswith(".pth")]
        return [sys.executable, *filter(None, sys.path), *lists, *config]


def _files_in(directory: str) -> list[str]:
    try:
        return [directory, *(entry.path for entry in os.scandir(directory))]
    except OSError:
        return [directory]


def _stamp(path: str) -> Optional[tuple[int, int, int]]:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino

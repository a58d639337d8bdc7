"""Modules that a fork server loads before it serves.

A rehearsal finds them: a child becomes a complete server, with the site's own configuration and
extensions, reports all modules it has loaded, and ends. No list has to be maintained.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, NoReturn

from . import npm, pages, patches
from .confinement import join
from .freshness import Freshness
from .programs import end_programs
from .server import enter, run_jupyter
from .spoilers import spoilers
from .wire import Launch

REHEARSAL = "rehearsal.json"
"""The launch to rehearse, in the working directory."""
_REHEARSAL_SECONDS = 60
"""Seconds after which a rehearsal is abandoned."""
_PROOF_PATHS = ("api", "api/me")
"""Requests by which a keeper verifies that a server runs."""
_FIRST_PATHS = ("lab", "api/kernelspecs", "api/contents", "lsp/status")
"""A browser's first requests; answering them loads more modules."""
_ANSWER_SECONDS = 5.0
"""Seconds to wait for each answer; what it would have loaded is then loaded by each server."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""
_MOST_PATTERNS = 400
"""Maximum number of precompiled regular expressions; Python caches at most 512."""
_MOST_SPOILERS = 6
"""Maximum number of modules excluded for their import side effects; each costs a restart."""
_AVOID = "LABKEEPER_AVOID"
"""The environment variable that passes them on."""


class PreloadError(Exception):
    """Servers cannot be forked from this process; the message is the reason."""


def load(listener: socket.socket) -> Freshness:
    """Load what servers need; return a check of whether it is still current. Raises PreloadError.

    Restarts, as a fresh program with the same listener, if a module spoiled this process or the
    disk changed.
    """
    avoid = set(filter(None, os.environ.pop(_AVOID, "").split(",")))
    try:
        freshness = Freshness()
        spoiling = _import_all(listener, avoid)
    except Exception as error:
        raise PreloadError(f"loading JupyterLab failed: {error}") from error
    if len(avoid | spoiling) > _MOST_SPOILERS:
        raise PreloadError(
            f"importing {', '.join(sorted(avoid | spoiling))} "
            "starts threads or programs, or opens sockets"
        )
    if spoiling or freshness.settle() is not None:
        os.environ[_AVOID] = ",".join(avoid | spoiling)
        listener.set_inheritable(True)
        end_programs()
        os.execv(  # noqa: S606 - the interpreter that runs already
            sys.executable,
            [sys.executable, os.path.dirname(__file__), "fork", str(listener.fileno())],
        )
    return freshness


def written_pages(listener: socket.socket) -> list[tuple[int, int]]:
    """Return the pages of this process that a starting server writes to, by a second rehearsal.

    Raises PreloadError.
    """
    return [(address, size) for address, size in _rehearse(listener, ())["pages"]]


def rehearsed_launch() -> Launch:
    """Return the launch that is rehearsed. Raises WireError, OSError."""
    return Launch.read(os.open(REHEARSAL, os.O_RDONLY))


def _import_all(listener: socket.socket, avoid: Collection[str]) -> set[str]:
    """Import the modules of a server except those to `avoid`; return another to be avoided, if any.

    That one has spoiled this process (see `spoilers`).
    """
    importlib.import_module("jupyterlab.labapp")
    ours = spoilers()
    told = _rehearse(listener, _FIRST_PATHS)
    # Packages before their modules: importing a module imports its package, so a spoiler is found
    # by its own name.
    for name in sorted(told["modules"], key=lambda name: name.count(".")):
        if name in sys.modules or any(f"{name}.".startswith(f"{avoided}.") for avoided in avoid):
            continue
        try:
            importlib.import_module(name)
        except BaseException as error:
            # Servers import it themselves, as one did in the rehearsal.
            print(f"[labkeeper] cannot preload {name}: {error!r}", file=sys.stderr, flush=True)
        if spoilers() - ours:
            return {name}
    for pattern in told["patterns"][:_MOST_PATTERNS]:
        re.compile(*pattern)
    npm.prefixes.update(told["npm_prefixes"])
    patches.describe_the_system_once()
    return set()


def _rehearse(listener: socket.socket, paths: Iterable[str]) -> dict[str, Any]:
    """Run a server in a child, in its own directory; return what it reports.

    That is its modules, patterns and pages, and npm's answers. It answers requests for `paths`
    first. Raises PreloadError.
    """
    launch = rehearsed_launch()
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        # By its end a keeper detects that of the fork server, so no program may hold it.
        listener.close()
        _perform(launch, paths, writer, parent)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        # Not to its end: forks of the rehearsal may hold the other end open.
        report = stream.readline()
    _, status = os.waitpid(pid, 0)
    end_programs()
    try:
        return dict(json.loads(report))
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise PreloadError(
            f"the rehearsal of a server failed ({end}); see the fork server's log"
        ) from None


def _perform(launch: Launch, paths: Iterable[str], writer: int, parent: int) -> NoReturn:
    code = 1
    try:
        # It ends with its parent, which may have ended already, and after a time limit.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit("the fork server has ended")
        signal.alarm(_REHEARSAL_SECONDS)
        shared = pages.writable()
        # Its group finds all that it starts, even hidden processes. Without one, it continues.
        with contextlib.suppress(OSError):
            join(launch.cgroups)
        enter(replace(launch, cgroups=[]))
        token = secrets.token_hex(24)
        launch = replace(launch, config={**launch.config, "IdentityProvider": {"token": token}})

        def ready(app: Any) -> None:
            app.io_loop.add_callback(_warm_and_tell, app, token, paths, shared, writer)

        run_jupyter(launch, ready)
        code = 0
    except SystemExit as end:
        code = 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


async def _warm_and_tell(
    app: Any, token: str, paths: Iterable[str], shared: list[tuple[int, int]], writer: int
) -> None:
    try:
        info = app.server_info()
        for path in _PROOF_PATHS:
            await _get(info, path, token)
        told: dict[str, Any] = {"pages": pages.copied(shared)}
        for path in paths:
            # An extension may wait for a program that hangs.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_get(info, path, token), _ANSWER_SECONDS)
        told["modules"] = [name for name in list(sys.modules) if not name.startswith("__m")]
        # Python does not specify its cache of patterns: without it there are none.
        told["patterns"] = [
            key[1:]
            for key in getattr(re, "_cache", ())
            if isinstance(key, tuple) and key[:1] == (str,)
        ]
        told["npm_prefixes"] = npm.prefixes
        with os.fdopen(writer, "w") as report:
            report.write(json.dumps(told) + "\n")
    finally:
        # After an error too: the fork server waits for the end of its rehearsal.
        app.stop()


async def _get(info: dict[str, Any], path: str, token: str) -> None:
    reader, stream = await asyncio.open_connection("127.0.0.1", info["port"])
    head = (
        f"GET {info['base_url']}{path} HTTP/1.0\r\n"
        f"Host: 127.0.0.1\r\nAuthorization: token {token}\r\n\r\n"
    )
    stream.write(head.encode())
    await reader.read()
    stream.close()

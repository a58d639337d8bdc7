"""A process that becomes one JupyterLab server: after a fork, or after it was executed for that.

All that is particular to a server comes with its `Launch`, and is put in force here, before Jupyter looks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import secrets
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

from . import patches
from .extension import report_ready
from .marks import mark, show
from .privileges import drop_bounding_set
from .renewal import renew
from .wire import Launch
from .wire import receive as receive_frame

_COOKIE_SECRET_BYTES = 32
_OOM_SCORE = 300
"""Added to what Linux makes of the memory that a process uses, of 1000 for all there is, when it looks for one to kill."""
_exit_code = 0


def end_fast() -> None:
    """Let this process end without taking the interpreter down, which would take longer than all the rest of a stop.

    To be called before anything else is imported: what registers first runs last, after threads were joined and every other
    hook has run.
    """

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(_exit_code)

    atexit.register(leave)


def receive(descriptor: int) -> tuple[Launch, int, int]:
    """Take the launch out of a socket; give it with its log and the pipe to report to. Raises WireError, EOFError, OSError."""
    with socket.socket(fileno=descriptor) as connection:
        message, (log, report) = receive_frame(connection)
    return Launch.parse(message), log, report


def become_server(launch: Launch, log: int, report: int) -> None:
    """Put a launch in force in this process, and run JupyterLab until it ends; the process ends with its exit code."""
    global _exit_code  # noqa: PLW0603 - the one thing that the hook at the exit has to know
    _exit_code = 1
    _open_streams(log)
    try:
        enter(launch)
    except Exception as error:
        sys.exit(f"[labkeeper] cannot start the server: {error}")
    try:
        run_jupyter(launch, lambda app: report_ready(app, report, launch.server_dir))
        _exit_code = 0
    except SystemExit as end:
        _exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, ModuleNotFoundError) and error.name in {"jupyterlab", "jupyter_server"}:
            sys.exit(
                f"No module named '{error.name}': install jupyterlab for {sys.executable}, "
                "or name an interpreter that has it by LABKEEPER_JUPYTER_PYTHON"
            )
        file = _broken_configuration(error)
        sys.exit(f"bad configuration: cannot load {file}: {error}" if file else 1)


def enter(launch: Launch) -> None:
    """Put a launch in force in this process. What needs the keeper's rights comes before the change of user."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    join(launch.cgroups)
    for name, limit in launch.rlimits.items():
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (most, most))
    _go_first_without_memory()
    show(launch.title)
    mark(launch.server_dir)
    os.umask(launch.umask)
    os.environ.clear()
    os.environ.update(launch.env)
    time.tzset()
    sys.argv[:] = ["jupyter-lab"]
    # The main module of a server is not ours: `multiprocessing` runs it once more in each process that it spawns.
    sys.modules["__main__"] = types.ModuleType("__main__")
    if launch.user is not None:
        drop_bounding_set()
        os.setgroups(launch.user.groups)
        os.setresgid(launch.user.gid, launch.user.gid, launch.user.gid)
        os.setresuid(launch.user.uid, launch.user.uid, launch.user.uid)
    _go_to(launch.cwd)
    runtime_dir = launch.env["JUPYTER_RUNTIME_DIR"]
    if not os.access(runtime_dir, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"user {os.getuid()} cannot use {runtime_dir}; set LABKEEPER_RUNTIME_DIR to where it can")
    renew()


def join(cgroups: list[str]) -> None:
    """Move this process into control groups, each given by the file of its members. Raises OSError."""
    for path in cgroups:
        with open(path, "w") as members:
            members.write(str(os.getpid()))


def _go_to(directory: str) -> None:
    """Enter the root directory as the server's user: one that this user can read, and the one that was allowed."""
    here = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fchdir(here)
    os.close(here)
    if os.getcwd() != directory:
        # It was resolved when it was allowed; a part of it has become a link since, which may lead anywhere.
        raise NotADirectoryError(f"the root directory {directory} leads to another place now; ask for that one, if it is meant")


def run_jupyter(launch: Launch, ready: Callable[[Any], None]) -> None:
    """Run JupyterLab until it ends; call `ready` with its ServerApp when its socket listens and its loop runs."""
    # Imported here: the fork server has them already, and who is executed wants its log open first.
    from jupyterlab.labapp import LabApp
    from traitlets.config import Config

    from .app import ServerApp

    patches.count_no_reading()
    patches.tell_no_page_the_token()
    chosen = Config({section: dict(values) for section, values in launch.config.items()})
    chosen.ServerApp.cookie_secret = secrets.token_bytes(_COOKIE_SECRET_BYTES)
    LabApp.serverapp_class = ServerApp
    app = LabApp.initialize_server(
        argv=[],
        config=chosen,
        # It would write the token into a page that others can read; no option of its configuration.
        no_browser_open_file=True,
        # A configuration that cannot be read must not leave its server without the protection that it asks for.
        raise_config_file_errors=True,
        launch=launch,
        ready=ready,
    )
    patches.hold_ports()
    app.start()


def _open_streams(log: int) -> None:
    """Make the log our standard output and error; there is no input."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for descriptor in {nothing, log} - {0, 1, 2}:
        os.close(descriptor)


def _go_first_without_memory() -> None:
    """Let Linux choose us and what we start, rather than the keeper and fork servers, when memory has run out."""
    # There may be no /proc, or nothing there to write to.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as score:
        ours = int(score.read())
        score.seek(0)
        score.write(str(max(ours, _OOM_SCORE)))


def _broken_configuration(error: BaseException) -> str | None:
    """Name the configuration file whose loading raised an error; None when it came from elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.name == "load_config_file" for frame in frames):
        return None
    return getattr(error, "filename", None) or frames[-1].filename

"""A process that becomes one JupyterLab server, after a fork or an exec.

All that is specific to a server comes with its `Launch`, and is applied here before Jupyter starts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from . import patches
from .confinement import confine, open_streams
from .extension import report_ready
from .renewal import renew
from .wire import Launch
from .wire import receive as receive_frame
from .zygote_client import FirstZygote

_COOKIE_SECRET_BYTES = 32
_exit_code = 1


def end_fast() -> None:
    """Exit this process without finalising the interpreter, which is the slowest part of a stop.

    Call this before other imports: hooks registered first run last, after threads were joined.
    """

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(_exit_code)

    atexit.register(leave)


class Given(NamedTuple):
    """What a process is given to become a server."""

    launch: Launch
    log: int
    report: int
    zygote: FirstZygote = FirstZygote()


def receive(descriptor: int) -> Given:
    """Receive it from a socket. Raises WireError, EOFError, OSError."""
    with socket.socket(fileno=descriptor) as connection:
        message, (log, report) = receive_frame(connection)
    return Given(Launch.parse(message), log, report)


def become_server(given: Given) -> None:
    """Apply a launch to this process and run JupyterLab; the process exits with its exit code."""
    global _exit_code  # noqa: PLW0603 - the only state that the exit hook reads
    launch = given.launch
    open_streams(given.log)
    try:
        enter(launch)
    except Exception as error:
        sys.exit(f"[labkeeper] cannot start the server: {error}")
    try:
        run_jupyter(launch, lambda app: report_ready(app, given.report), given.zygote)
        _exit_code = 0
    except SystemExit as end:
        _exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, ModuleNotFoundError) and error.name in {
            "jupyterlab",
            "jupyter_server",
        }:
            sys.exit(
                f"No module named '{error.name}': install jupyterlab for {sys.executable}, "
                "or name an interpreter that has it by LABKEEPER_JUPYTER_PYTHON"
            )
        file = _broken_configuration(error)
        sys.exit(f"bad configuration: cannot load {file}: {error}" if file else 1)


def enter(launch: Launch) -> None:
    """Apply a launch to this process; steps that need the keeper's rights come first."""
    confine(launch)
    os.environ.clear()
    os.environ.update(launch.env)
    time.tzset()
    sys.argv[:] = ["jupyter-lab"]
    # Not this program's: `multiprocessing` reruns the main module in each process that it spawns.
    sys.modules["__main__"] = types.ModuleType("__main__")
    _go_to(launch.cwd)
    runtime_dir = launch.env["JUPYTER_RUNTIME_DIR"]
    if not os.access(runtime_dir, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(
            f"user {os.getuid()} cannot use {runtime_dir}; "
            "set LABKEEPER_RUNTIME_DIR to one that it can use"
        )
    renew()


def _go_to(directory: str) -> None:
    """Enter the root directory as the server's user; it must be readable and unmoved."""
    here = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fchdir(here)
    os.close(here)
    if os.getcwd() != directory:
        # It was resolved when it was allowed; since then part of it has become a link.
        raise NotADirectoryError(
            f"the root directory {directory} leads to another place now; "
            "ask for that one, if it is meant"
        )


def run_jupyter(
    launch: Launch, ready: Callable[[Any], None], zygote: FirstZygote | None = None
) -> None:
    """Run JupyterLab until it ends; call `ready` with its ServerApp once it listens."""
    # Imported late: the fork server has them, and an executed process needs its log open first.
    from jupyterlab.labapp import LabApp
    from traitlets.config import Config

    from .app import ServerApp

    patches.count_no_reading()
    patches.tell_no_page_the_token()
    patches.parse_no_command_lines()
    chosen = Config({section: dict(values) for section, values in launch.config.items()})
    chosen.ServerApp.cookie_secret = secrets.token_bytes(_COOKIE_SECRET_BYTES)
    LabApp.serverapp_class = ServerApp
    app = LabApp.initialize_server(
        argv=[],
        config=chosen,
        # It would write the token into a file that others can read; not a configurable trait.
        no_browser_open_file=True,
        # An unreadable configuration must not leave the server without its protection.
        raise_config_file_errors=True,
        launch=launch,
        ready=ready,
        zygote=zygote or FirstZygote(),
    )
    patches.hold_ports()
    app.start()


def _broken_configuration(error: BaseException) -> str | None:
    """Return the configuration file whose loading raised an error, or None."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.name == "load_config_file" for frame in frames):
        return None
    return getattr(error, "filename", None) or frames[-1].filename

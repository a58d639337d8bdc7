"""A process that becomes one kernel after a fork, as if it had been executed."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
import types
from typing import Any

from . import patches, wire
from .classes import derived
from .kernel_loader import Loaded
from .marks import show
from .privileges import be_inspectable
from .renewal import renew
from .wire import KernelLaunch
from .zygote import Files

_SETTLE_SECONDS = 0.25
"""Seconds after which clients of an earlier kernel have connected again to its ports.

ZeroMQ tries every 0.1 to 0.2 s; a client that is connected again for requests, but not yet for
broadcasts, would miss the output of its first cells.
"""


def become_kernel(files: Files, loaded: Loaded) -> None:
    """Apply a kernel's launch to this process, and run it until it ends."""
    try:
        launch = KernelLaunch.read(files.launch)
    except wire.WireError:
        # The server has withdrawn it.
        os._exit(1)
    os.setsid()
    _empty_input()
    show(*launch.argv)
    be_inspectable()
    os.environ.clear()
    os.environ.update({**launch.env, **loaded.set})
    time.tzset()
    os.chdir(launch.cwd)
    _present(launch, loaded)
    renew()
    for name in loaded.foreign:
        sys.modules.pop(name, None)
    _app_class(launch, files, loaded).launch_instance()


def _empty_input() -> None:
    """Make standard input a pipe at its end, as Jupyter does."""
    reader, writer = os.pipe()
    os.dup2(reader, 0)
    os.close(reader)
    os.close(writer)


def _present(launch: KernelLaunch, loaded: Loaded) -> None:
    """Make the interpreter's record of its command line the kernel's."""
    options = launch.argv[1 : launch.argv.index("-m")]
    sys.executable = launch.argv[0]
    with contextlib.suppress(AttributeError):  # Python 3.9 has none.
        sys.orig_argv[:] = launch.argv
    sys.argv[:] = [loaded.launcher, *launch.argv[len(options) + 3 :]]
    sys._xoptions.clear()  # noqa: SLF001 - documented for CPython
    sys._xoptions.update(xoptions(options))  # noqa: SLF001
    # IPython replaces it; until then it must not be this program's.
    sys.modules["__main__"] = types.ModuleType("__main__")


def xoptions(options: list[str]) -> dict[str, Any]:
    """Return the options of the interpreter as `sys._xoptions` has them."""
    pairs = (option[2:].partition("=") for option in options if option.startswith("-X"))
    return {name: value if equals else True for name, equals, value in pairs}


def _app_class(launch: KernelLaunch, files: Files, loaded: Loaded) -> Any:
    """Derive IPython's kernel application: it reports its ports, and ends with the server."""
    from ipykernel import kernelapp, parentpoller
    from traitlets.config import Config

    kind: Any = kernelapp.IPKernelApp
    poller: Any = parentpoller.ParentPollerUnix
    bound: list[float] = []

    def write_connection_file(app: Any, **given: Any) -> None:
        # All ports are open. With encryption, the file is removed and written anew here, and until
        # then the server must not read it.
        kind.write_connection_file(app, **given)
        os.write(files.report, wire.line({"bound": True}))
        bound.append(time.monotonic())

    def init_kernel(app: Any) -> None:
        kind.init_kernel(app)
        patches.debug_libraries(app.kernel, loaded.libraries.files)

    def init_poller(app: Any) -> None:
        app.parent_handle = int(launch.env.get("JPY_PARENT_PID") or 0)
        app.poller = derived(poller, {"run": wait_for_end})()

    def start(app: Any) -> None:
        if launch.again and bound:
            time.sleep(max(0.0, bound[0] + _SETTLE_SECONDS - time.monotonic()))
        kind.start(app)

    def parse_command_line(app: Any, argv: Any = None) -> None:
        if argv is not None or sys.argv[1:-1] != ["-f"]:
            kind.parse_command_line(app, argv)
            return
        # The usual one has a single option; a parser of all of them takes a tenth of the start.
        app.argv, app.extra_args = sys.argv[1:], []
        app.cli_config = Config({kind.__name__: {"connection_file": sys.argv[-1]}})
        app.update_config(app.cli_config)

    def wait_for_end(_: Any) -> None:
        # The server is not the parent, which ipykernel would look at. It may also have given up
        # this kernel, whose fork was answered too late: then the pipe has no reader.
        poll = select.poll()
        poll.register(files.server, select.POLLIN)
        poll.register(files.report, select.POLLERR)
        poll.poll()
        os._exit(1)

    ours = (parse_command_line, init_kernel, init_poller, write_connection_file, start)
    return derived(kind, {method.__name__: method for method in ours})

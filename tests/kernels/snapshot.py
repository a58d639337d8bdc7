"""Everything that a cell can find out of its process; `test_equality.py` runs this in a cell.

As in a cell, IPython defines a name, and files are opened in the shortest way.
"""
# ruff: noqa: F821, PLC0415, PLW1510, PTH109, PTH111, PTH115, PTH123, PTH208

import asyncio
import ctypes
import gc
import json
import locale
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import warnings


def name(thing):
    return getattr(thing, "__qualname__", None) or type(thing).__qualname__


def read(path):
    with open(path) as file:
        return file.read()


def descriptors():
    found, inheritable = [], []
    for number in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            kind = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # That of the listing itself.
        kind = kind if kind.startswith(("/", "anon_inode")) else kind.partition(":")[0]
        # How many sockets are open, and what ZeroMQ needs for them, depends on what the server has
        # sent so far, and which files of the history on whether its thread is writing.
        if kind not in {"socket", "anon_inode:[eventfd]"} and "profile_default" not in kind:
            found.append(kind)
        if os.get_inheritable(number):
            inheritable.append((number, kind))
    kinds = {kind: found.count(kind) for kind in sorted(set(found))}
    return {"kinds": kinds, "inheritable": inheritable}


def status():
    lines = dict(line.split(":\t", 1) for line in read("/proc/self/status").splitlines())
    wanted = (
        "Name",
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "SigPnd",
        "ShdPnd",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Cpus_allowed",
        "Threads",
        "THP_enabled",
    )
    return {what: lines[what] for what in wanted if what in lines}


def process():
    prctl, flag = ctypes.CDLL(None).prctl, ctypes.c_int()
    found = {}
    for number, what in ((2, "signal at the parent's death"), (37, "subreaper")):
        prctl(number, ctypes.byref(flag))
        found[what] = flag.value
    found["dumpable"] = prctl(3)
    found["timer slack"] = prctl(30)
    return {
        **found,
        # Space that is left is filled with null characters.
        "cmdline": read("/proc/self/cmdline").rstrip("\0").split("\0"),
        "comm": read("/proc/self/comm"),
        "exe": os.readlink("/proc/self/exe"),
        "environ": dict(os.environ),
        "environ of libc": {
            what: str(ctypes.CDLL(None).getenv(what.encode()) != 0) for what in os.environ
        },
        "environ of a child": read_child_environment(),
        "groups": read("/proc/self/cgroup"),
        "limits": {
            what: resource.getrlimit(getattr(resource, what))
            for what in dir(resource)
            if what.startswith("RLIMIT")
        },
        "leads its group and session": [os.getpgrp() == os.getpid(), os.getsid(0) == os.getpid()],
        "parent": str(os.getppid()),
        "nice": os.nice(0),
        "oom": read("/proc/self/oom_score_adj"),
        "affinity": sorted(os.sched_getaffinity(0)),
        "scheduler": os.sched_getscheduler(0),
        "cwd": os.getcwd(),
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "handlers": {
            str(number): name(signal.getsignal(number)) for number in signal.valid_signals()
        },
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "stdin": os.read(0, 1).hex(),
        "standard streams": [
            os.readlink(f"/proc/self/fd/{number}").partition(":")[0] for number in range(3)
        ],
    }


def read_child_environment():
    import subprocess

    lines = subprocess.run(["env", "-0"], capture_output=True, text=True).stdout.split("\0")
    return sorted(line for line in lines if line)


def interpreter():
    main = sys.modules["__main__"]
    return {
        **{
            what: getattr(sys, what)
            for what in (
                "argv",
                "orig_argv",
                "executable",
                "_base_executable",
                "prefix",
                "base_prefix",
                "path",
                "_xoptions",
                "warnoptions",
                "dont_write_bytecode",
                "pycache_prefix",
                "byteorder",
                "platlibdir",
                "exec_prefix",
                "version",
            )
        },
        "flags": str(sys.flags),
        "hooks": {
            what: name(getattr(sys, what))
            for what in (
                "excepthook",
                "displayhook",
                "breakpointhook",
                "unraisablehook",
                "__excepthook__",
            )
        },
        "threading hook": name(threading.excepthook),
        "tracing": [sys.gettrace(), sys.getprofile(), threading.gettrace()],
        "async generators": str(sys.get_asyncgen_hooks().firstiter is None),
        "recursion": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "encodings": [
            sys.getdefaultencoding(),
            sys.getfilesystemencoding(),
            sys.getfilesystemencodeerrors(),
        ],
        "streams": [
            (type(stream).__name__, stream.encoding, stream.errors, stream.line_buffering)
            for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__)
        ],
        "shown streams": [name(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "finders": [
            [name(finder) for finder in sys.meta_path],
            [name(finder) for finder in sys.path_hooks],
        ],
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_debug(), len(gc.callbacks)],
        "warnings": [str(entry) for entry in warnings.filters],
        "main": {
            what: type(value).__name__
            for what, value in vars(main).items()
            if not re.fullmatch("_i+|_i?[0-9]+", what)
        },
        "main's own": {
            what: str(vars(main).get(what))
            for what in (
                "__name__",
                "__doc__",
                "__package__",
                "__spec__",
                "__file__",
                "__annotations__",
            )
        },
        "modules of main": sys.modules["__main__"] is get_ipython().user_module,
        "faulthandler": __import__("faulthandler").is_enabled(),
    }


def libraries():
    return {
        "locale": [locale.setlocale(locale.LC_ALL), locale.getlocale(), locale.localeconv()],
        "time zone": [time.tzname, time.timezone, time.daylight],
        "loop": [
            name(type(asyncio.get_running_loop())),
            name(asyncio.get_event_loop_policy()),
            asyncio.get_running_loop().get_debug(),
            asyncio.get_running_loop()._default_executor is None,
        ],
        "tasks": sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks()),
        "threads": sorted(
            # The debugger counts one, and is imported earlier or later.
            re.sub(r"0x\w+|\d+", "N", thread.name)
            for thread in threading.enumerate()
        ),
        "daemons": sorted(thread.name for thread in threading.enumerate() if not thread.daemon),
        "main thread": [
            threading.main_thread() is threading.current_thread(),
            threading.main_thread().native_id == os.getpid(),
        ],
        "logging": {
            what: [[name(handler) for handler in logger.handlers], logger.level, logger.propagate]
            for what, logger in [("", logging.root), *logging.root.manager.loggerDict.items()]
            if getattr(logger, "handlers", None)
        },
        "root level": [logging.root.level, logging.root.manager.disable, logging.raiseExceptions],
        "multiprocessing": [
            multiprocessing.get_start_method(allow_none=True),
            multiprocessing.current_process().name,
            multiprocessing.parent_process() is None,
            len(multiprocessing.active_children()),
        ],
        "temporary": tempfile.gettempdir(),
        "home": os.path.expanduser("~"),
    }


def ipython():
    shell = get_ipython()
    app = shell.kernel.parent
    return {
        "config": json.loads(json.dumps(app.config, default=str)),
        "classes": [name(type(thing)) for thing in (app, shell, shell.kernel, app.session)],
        "modules": [type(thing).__module__ for thing in (app, shell, shell.kernel, app.session)],
        "directories": [
            shell.ipython_dir,
            shell.profile_dir.location,
            str(shell.history_manager.hist_file),
            app.connection_dir,
        ],
        "files": [app.connection_file, app.abs_connection_file],
        "argv": app.argv,
        "extra": app.extra_args,
        "loaded": [str(file) for file in app.loaded_config_files],
        "count": shell.execution_count,
        "events": {
            what: sorted(name(callback) for callback in callbacks)
            for what, callbacks in shell.events.callbacks.items()
        },
        "transformers": [
            name(one)
            for one in (
                *shell.input_transformers_cleanup,
                *shell.input_transformers_post,
                *shell.ast_transformers,
            )
        ],
        "magics": {kind: sorted(magics) for kind, magics in shell.magics_manager.magics.items()},
        "backend": os.environ.get("MPLBACKEND"),
        "parent poller": name(type(app.poller)),
        "log level": app.log_level,
        "log handlers": [name(handler) for handler in app.log.handlers],
        "display": sorted(map(str, shell.display_formatter.active_types)),
        "printers": {
            kind: sorted(map(str, [*formatter.type_printers, *formatter.deferred_printers]))
            for kind, formatter in shell.display_formatter.formatters.items()
        },
    }

"""Checks of what runs servers: the interpreter, JupyterLab, and the fork server."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Final

from labkeeper.backends.local.accounts import common_environment
from labkeeper.backends.local.backend import forkserver_inputs, why_not_forked
from labkeeper.backends.local.cleanup import end_with_all_below
from labkeeper.backends.local.forkserver import PLACE, ForkServers, NoForkServerError, connect
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.doctor import asked
from labkeeper.doctor.case import Case
from labkeeper.doctor.findings import Finding, ok, problem, setting, skipped, warning
from labkeeper.forkserver.peers import credentials
from labkeeper.jupyter.config import base_environment
from labkeeper.serve.policies import local_options
from labkeeper.threads import ThreadGroup

_OLDEST: Final = (3, 9)
"""Version of Python that our program in Jupyter's interpreter needs."""
_WITHIN: Final = 60.0
"""Seconds in which an interpreter must answer, which may have to compile all of Jupyter."""
_LIBRARIES_WITHIN: Final = 120.0
"""Seconds in which the kernel loader must have loaded the libraries."""
_LOG_LINES: Final = 5
_NOISE: Final = (
    *(" ", "Traceback ", "During handling ", "The above exception "),
    *("[labkeeper] ", "labkeeper_forkserver."),
)
"""How lines of its log begin that do not name a cause."""
_NO_INTERPRETER: Final = "the interpreter does not run"
_NO_JUPYTER: Final = "No module named 'jupyter"
_VERSION: Final = "import platform; print(platform.python_version())"
_JUPYTER: Final = """
import importlib.metadata, importlib.util, json
import jupyterlab.labapp
names = [name for name in ("jupyterlab", "ipykernel") if importlib.util.find_spec(name)]
print(json.dumps({name: importlib.metadata.version(name) for name in names}))
"""


class _FailedError(Exception):
    """A program failed; the message is the reason."""


def interpreter(case: Case) -> Iterator[Finding]:
    """Whether the interpreter of servers runs, and is new enough."""
    python = case.settings.jupyter_python
    try:
        version = _run(case, _VERSION)
    except _FailedError as error:
        why = f"cannot run {python} (LABKEEPER_JUPYTER_PYTHON): {error}"
        yield problem("interpreter", why, _other_interpreter())
        return
    if _release(version) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        yield problem(
            "interpreter",
            f"{python} is Python {version}, and servers need {needed} or later",
            _other_interpreter(),
        )
    else:
        yield ok("interpreter", f"Python {version}: {python}")


def _other_interpreter() -> str:
    """Return the command that has the keeper's own interpreter run servers."""
    return setting("jupyter_python", sys.executable)


def jupyterlab(case: Case) -> Iterator[Finding]:
    """Whether that interpreter can import JupyterLab and ipykernel, in usable versions."""
    python = case.settings.jupyter_python
    if not _runs(case):
        yield skipped("JupyterLab", _NO_INTERPRETER)
        return
    try:
        versions = json.loads(_run(case, _JUPYTER))
    except _FailedError as error:
        why = f"{python} cannot import JupyterLab: {error}"
        yield problem("JupyterLab", why, _install(case))
        return
    for requirement in needed():
        name, _, oldest = requirement.partition(">=")
        found = versions.get(name)
        if found is None:
            why = f"{name} is not installed for {python}: no Python kernel can run beside a server"
            yield warning("JupyterLab", why, _install(case))
        elif _release(found) < _release(oldest):
            why = f"{name} {found} of {python} is older than {oldest}"
            yield problem("JupyterLab", why, _install(case))
    yield ok("JupyterLab", ", ".join(f"{name} {version}" for name, version in versions.items()))


def needed() -> list[str]:
    """Return what we require of Jupyter's environment, such as `jupyterlab>=4.4`."""
    found = (text.partition(";") for text in requires("labkeeper") or ())
    return [name.strip() for name, _, marker in found if "lab" in re.findall(r"\w+", marker)]


def _install(case: Case) -> str:
    return shlex.join([str(case.settings.jupyter_python), "-m", "pip", "install", *needed()])


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _runs(case: Case) -> bool:
    try:
        _run(case, _VERSION)
    except _FailedError:
        return False
    return True


def _run(case: Case, program: str) -> str:
    """Return the last line that a Python program prints. Raises _FailedError."""
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter is a setting, the program ours
            [case.settings.jupyter_python, "-c", program],
            capture_output=True,
            text=True,
            errors="replace",
            env=base_environment(common_environment()),
            cwd="/",
            timeout=_WITHIN,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _FailedError(f"it does not answer within {_WITHIN:g} s") from None
    except OSError as error:
        raise _FailedError(str(error.strerror)) from error
    if done.returncode != 0:
        raise _FailedError(_last(done.stderr) or f"it ended with {done.returncode}")
    return _last(done.stdout)


def _last(text: str) -> str:
    return next(iter(text.strip().splitlines()[-1:]), "")


def forkserver(case: Case) -> Iterator[Finding]:
    """Whether servers are forked, or why they are executed.

    A running keeper says it of its servers; without one, a fork server is loaded on trial.
    """
    if why_not := why_not_forked(local_options(case.settings)):
        yield ok("fork server", f"servers are executed: {why_not}")
    if case.keeper is not None:
        yield from asked.launches(case)
        yield from _present(case)
    elif not why_not:
        yield from _trial(case) if _runs(case) else (skipped("fork server", _NO_INTERPRETER),)


def _present(case: Case) -> Iterator[Finding]:
    """Name the fork servers of a running keeper."""
    for directory in sorted((case.settings.server_dirs / PLACE).glob("*")):
        with contextlib.suppress(OSError), connect(directory) as connection:
            pid, *_ = credentials(connection)
            yield ok("fork server", f"one runs as process {pid}")


def _trial(case: Case) -> Iterator[Finding]:
    """Load a fork server as a keeper would, and end it."""
    with (
        tempfile.TemporaryDirectory(prefix="labkeeper-doctor-") as place,
        closing(ThreadGroup()) as threads,
    ):
        runtime_dir, log_dir = Path(place, "run"), Path(place, "logs")
        log_dir.mkdir()
        processes = ForkServers(
            threads,
            runtime_dir=runtime_dir,
            log_dir=log_dir,
            groups=ControlGroups(runtime_dir),
            **forkserver_inputs(local_options(case.settings)),
        )
        try:
            instance = processes.spawn()
        except NoForkServerError as error:
            reason = str(error).partition(" (log: ")[0]
            yield _not_loaded(case, reason, _log_tail(log_dir))
            return
        try:
            yield ok("fork server", "it loads JupyterLab, and can fork servers")
            if case.settings.preload:
                message = processes.receive(instance.connection, within=_LIBRARIES_WITHIN)
                yield from _libraries(case.settings.preload, message)
        except NoForkServerError as error:
            yield _not_loaded(case, str(error), _log_tail(log_dir))
        finally:
            end_with_all_below(instance.process)


def _libraries(chosen: Sequence[str], message: Mapping[str, Any]) -> Iterator[Finding]:
    """Say which libraries a fork server can preload, by its message."""
    left_out = message.get("left_out", {})
    loaded = [name for name in chosen if name not in left_out]
    for name, reason in left_out.items():
        yield asked.without_library(name, str(reason), loaded)
    if loaded:
        yield ok("libraries", f"kernels can share {', '.join(loaded)}")


def _not_loaded(case: Case, reason: str, log: Sequence[str]) -> Finding:
    mend = setting("launch_by", "exec")
    if _NO_JUPYTER in reason:
        mend = _install(case)
    elif log:
        mend = "correct the Jupyter configuration or extension that these lines of its log name"
    why = f"it cannot be loaded, and servers would be executed: {reason}"
    return problem("fork server", why, mend, log)


def _log_tail(log_dir: Path) -> list[str]:
    """Return the last lines that a fork server has written, without tracebacks and ours."""
    lines = [
        line
        for log in log_dir.glob("*.log")
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip() and not line.startswith(_NOISE)
    ]
    return lines[-_LOG_LINES:]

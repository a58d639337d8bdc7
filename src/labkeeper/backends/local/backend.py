"""Backend that runs servers as processes of this machine.

Each server has its own directory, `<runtime_dir>/<name>/`, and while it lives a supervisor: a
thread that waits for its readiness and its end, cleans up after it, and reports each step.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from labkeeper.backends.local.accounts import common_environment
from labkeeper.backends.local.ancestry import Ancestry
from labkeeper.backends.local.cleanup import LIMIT, EarlierDir, clear, strays
from labkeeper.backends.local.forking import ForkServer
from labkeeper.backends.local.forkserver import remove_dead
from labkeeper.backends.local.launching import Launcher, ReportPipe, report_pipe
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.memory import free_memory
from labkeeper.backends.local.options import LocalOptions
from labkeeper.backends.local.paths import Paths
from labkeeper.backends.local.ports import hold_port
from labkeeper.backends.local.processes import boot_id
from labkeeper.backends.local.server_dir import Record
from labkeeper.backends.local.sites import Sites
from labkeeper.backends.local.starting import Starter, start_error
from labkeeper.backends.local.supervisor import ProcessSupervisor
from labkeeper.backends.local.terminals import foregrounds
from labkeeper.backends.local.usage import Meter
from labkeeper.core.access import Caller
from labkeeper.core.errors import BackendRefused, BackendUnavailable
from labkeeper.core.messages import Ended, Fact, Gone, Report, Seen
from labkeeper.core.ports import Capacity, Library
from labkeeper.core.server import Exit, StopMethod, Usage
from labkeeper.core.spec import QualifiedName, ServerSpec
from labkeeper.forkserver.wire import WireError
from labkeeper.jupyter.client import JupyterClient
from labkeeper.jupyter.config import base_config, base_environment
from labkeeper.scrub import of_server
from labkeeper.threads import ThreadGroup

_log = structlog.get_logger("labkeeper.backends.local.backend")


class LocalBackend:
    """Runs each server as a process, forked from a fork server or executed.

    See `core.ports.Backend` for the laws.
    """

    def __init__(
        self,
        report: Callable[[Report], None],
        options: LocalOptions,
        *,
        paths: Paths,
        client: JupyterClient,
        earlier: Sequence[EarlierDir] = (),
        found_orphans: Callable[[QualifiedName, Collection[int]], None] = lambda _name, _pids: None,
    ) -> None:
        """`found_orphans` is called with processes of an earlier keeper that were ended.

        Servers in `earlier` directories are ended, not adopted.
        """
        # Resolved, so that a server's mark is the same for keepers that come by another link.
        runtime_dir = options.runtime_dir.resolve()
        self._options = options = replace(options, runtime_dir=runtime_dir)
        self._report = report
        self._paths = paths
        self._found_orphans = found_orphans
        self._supervisors: dict[QualifiedName, ProcessSupervisor] = {}
        self._groups = ControlGroups(runtime_dir)
        self._ancestry = Ancestry(
            {runtime_dir: self._groups} | {left.runtime_dir: left.groups for left in earlier}
        )
        self._earlier = {
            name: [left for left in earlier if name in left.names]
            for found in earlier
            for name in found.names
        }
        """Servers still to be ended in earlier runtime directories, by name."""
        self._meter = Meter(self._groups, runtime_dir) if sys.platform == "linux" else None
        self._threads = ThreadGroup()
        self._sites = Sites(options, self._groups, self._threads, client, report)
        why_not = why_not_forked(options)
        self._forkserver = None if why_not else self._start_forkserver()
        if self._forkserver is None:
            # Otherwise the fork server does this.
            self._threads.start("dead-forkservers", remove_dead, runtime_dir, self._groups)
        self._starter = Starter(self._sites, Launcher(options.python, self._forkserver, why_not))

    def _start_forkserver(self) -> ForkServer:
        forkserver = ForkServer(
            self._threads,
            runtime_dir=self._options.runtime_dir,
            log_dir=self._options.log_dir,
            groups=self._groups,
            **forkserver_inputs(self._options),
        )
        forkserver.start()
        return forkserver

    # The calls of the port

    def validate(self, spec: ServerSpec, caller: Caller) -> ServerSpec:
        """Return the spec with all links in its paths resolved."""
        return self._paths.validate(spec, caller)

    def launch(self, spec: ServerSpec, generation: int) -> None:
        """Create the server's directory and process."""
        supervisor = self._supervisors.get(spec.qualified_name)
        if (
            supervisor is not None
            and supervisor.generation == generation
            and supervisor.process.alive()
        ):
            return
        with (
            bound_contextvars(server=spec.qualified_name, generation=generation),
            _unavailable(f"start server '{spec.name}'"),
            self._threads.standing_by(f"supervise-{spec.qualified_name}") as given,
        ):
            # Here, not in the fleet's thread when it logs that the launch has failed.
            of_server(spec.qualified_name).prepare()
            self._clear(spec.qualified_name)
            hold = hold_port(spec)
            try:
                self._supervise(self._start(spec, generation, hold), given)
            except BaseException:
                hold.close()
                raise

    def terminate(
        self, name: QualifiedName, generation: int, grace: float, *, keep_kernels: bool = False
    ) -> None:
        """Request shutdown through Jupyter's API for half of `grace`, then send SIGTERM."""
        supervisor = self._supervisors.get(name)
        if supervisor is None:
            self._end_unsupervised(name, generation)
        else:
            ask = functools.partial(supervisor.ask_to_end, grace / 2, keep_kernels=keep_kernels)
            try:
                self._threads.start(f"ask-{name}", ask)
            except BackendUnavailable:
                # Blocking the job is better than not asking the server.
                ask()

    def kill(self, name: QualifiedName, generation: int) -> None:
        """Send SIGKILL to the server; its supervisor ends the rest."""
        supervisor = self._supervisors.get(name)
        if supervisor is None:
            self._end_unsupervised(name, generation)
        else:
            supervisor.kill()

    def observe(self, name: QualifiedName, generation: int) -> Fact:
        """Return the server's state, from its supervisor or an earlier keeper's record."""
        supervisor = self._supervisors.get(name)
        if supervisor is None:
            record = self._sites.server_dir(name).read_record()
            if (
                name in self._earlier
                or record is None
                or record.generation != generation
                or record.boot != boot_id()
            ):
                # A lost server directory or another runtime directory does not prove that the
                # server has ended.
                self._end_orphans(name)
                return Gone()
            with (
                _unavailable(f"look at server '{name}'"),
                self._threads.standing_by(f"supervise-{name}") as given,
            ):
                supervisor = ProcessSupervisor.adopted(
                    self._sites.site(name), record, self._attach(record)
                )
                if not supervisor.process.alive():
                    return supervisor.finish()
                self._supervise(supervisor, given)
        return Seen(answers=supervisor.look())

    def forget(self, name: QualifiedName) -> None:
        """Remove the server's directory and log."""
        self._clear(name)
        self._sites.log(name).remove()

    def usage(self, names: Collection[QualifiedName]) -> Mapping[QualifiedName, Usage]:
        """Return the usage of the servers that have a supervisor."""
        if self._meter is None:
            return {}
        return self._meter.measure(
            {
                name: supervisor.process
                for name in names
                if (supervisor := self._supervisors.get(name)) is not None
            }
        )

    def strays(self, known: Collection[QualifiedName]) -> Collection[QualifiedName]:
        """Return unknown servers with a directory, a marked process or a control group."""
        return (strays(self._options.runtime_dir, self._groups) | self._earlier.keys()) - set(known)

    def sweep(self, name: QualifiedName) -> None:
        """End all processes under the name; remove its control groups, and its directory if any."""
        report = None
        try:
            record = self._sites.server_dir(name).read_record()
            report = self._attach(record) if record is not None else None
            if not self._end_orphans(name):
                _log.info("removed the directory of a server of an earlier keeper", server=name)
        except BackendUnavailable as error:
            _log.error(
                "cannot end processes of an earlier keeper", server=name, error=error.message
            )
        finally:
            if report is not None:
                # An unread exit would be kept by its fork server for the next keeper.
                report.exit()
                report.close()

    def log(self, name: QualifiedName, tail: int | None) -> Sequence[str]:
        """Return the last `tail` lines of the log, or all for None. Raises BackendUnavailable."""
        try:
            return self._sites.log(name).tail(tail)
        except OSError as error:
            raise BackendUnavailable(
                f"cannot read the log of server '{name}': {error.strerror}"
            ) from error

    def programs(self, name: QualifiedName) -> Sequence[str] | None:
        """Return the foreground programs of the server's terminals, read from the process table."""
        supervisor = self._supervisors.get(name)
        return None if supervisor is None else foregrounds(supervisor.process)

    def libraries(self) -> list[Library]:
        """Return them as the fork server has told, or why it cannot."""
        if self._forkserver is None:
            why_not = "servers are executed, and each loads it for itself after its first kernel"
            return [Library(name, loaded=False, reason=why_not) for name in self._options.preload]
        known = self._forkserver.libraries
        return [
            Library(name, loaded=known[name] is None, reason=known[name])
            if name in known
            else Library(name, loaded=None, reason="it is being loaded")
            for name in self._options.preload
        ]

    def capacity(self) -> Capacity | None:
        """Return the memory of the machine or the keeper's container; reads a few short files."""
        return free_memory()

    def is_server(self, pid: int) -> bool:
        """Whether a process is a server or may descend from one, and so acts for its user."""
        return self._ancestry.is_of_server(
            pid, {supervisor.process.pid for supervisor in [*self._supervisors.values()]}
        )

    def follow(
        self, name: QualifiedName, tail: int | None, live: Callable[[], bool]
    ) -> Iterator[str]:
        """Yield lines of the log file as it grows."""
        return self._sites.log(name).follow(tail, live)

    def close(self) -> None:
        """End all threads.

        Servers live on for the next keeper to adopt, and the fork server while it has any.
        """
        self._threads.close()

    # Processes and their supervisors

    def _start(self, spec: ServerSpec, generation: int, hold: socket.socket) -> ProcessSupervisor:
        """Start a server's process; remove what is left of it if that fails."""
        try:
            return self._starter.start(spec, generation, hold)
        except BackendRefused:
            self._clear(spec.qualified_name)
            raise
        except (OSError, ValueError, WireError) as error:
            self._clear(spec.qualified_name)
            raise start_error(spec, error) from error

    def _attach(self, record: Record) -> ReportPipe | None:
        """Have a server's fork server report its end; None if it has no fork server, or a dead one.

        Raises BackendUnavailable.
        """
        if self._forkserver is None or record.forkserver is None:
            return None
        with _unavailable("ask a fork server about its child"), report_pipe() as report:
            if self._forkserver.attach(record.forkserver, record.pid, report.writer):
                return report
        report.close()
        return None

    def _supervise(
        self, supervisor: ProcessSupervisor, given: Callable[[Callable[[], None]], None]
    ) -> None:
        """Start supervision in the thread standing by."""
        if supervisor.record.launched_by == "exec":
            self._ancestry.note_executed(supervisor.process)
        self._supervisors[supervisor.name] = supervisor
        given(
            functools.partial(supervisor.supervise, functools.partial(self._deregister, supervisor))
        )

    def _deregister(self, supervisor: ProcessSupervisor) -> None:
        if self._supervisors.get(supervisor.name) is supervisor:
            del self._supervisors[supervisor.name]

    # Cleanup

    def _end_unsupervised(self, name: QualifiedName, generation: int) -> None:
        found = self._end_all(name)
        self._report(
            Report(
                name, generation, Ended(Exit(), StopMethod.SIGKILL if found else StopMethod.NONE)
            )
        )

    def _clear(self, name: QualifiedName) -> None:
        """End and remove what is left under a name, if there are signs of it.

        Only for names proven to be free by an end or an observation: a start must not cost the time
        of a full scan. Raises BackendUnavailable.
        """
        if (
            name in self._supervisors
            or name in self._earlier
            or os.path.lexists(self._sites.server_dir(name).path)
        ):
            self._end_all(name)

    def _end_orphans(self, name: QualifiedName) -> bool:
        """End what an earlier keeper left under a name, and log it; return whether there was any.

        Raises BackendUnavailable.
        """
        ended = self._end_all(name)
        if ended:
            _log.warning("ended processes of an earlier keeper", server=name, pids=sorted(ended))
            self._found_orphans(name, ended)
        return bool(ended)

    def _end_all(self, name: QualifiedName) -> set[int]:
        """End all processes under a name, with or without a directory; return their pids.

        Raises BackendUnavailable.
        """
        supervisor = self._supervisors.get(name)
        if supervisor is not None:
            supervisor.kill()
            supervisor.wait(LIMIT)
        with _unavailable(f"end all of server '{name}'"):
            found = clear(self._sites.server_dir(name), self._groups)
            for earlier in self._earlier.get(name, ()):
                found |= earlier.clear(name)
        self._earlier.pop(name, None)
        return found


@contextmanager
def _unavailable(what: str) -> Iterator[None]:
    """Raise BackendUnavailable instead of OSError, so that the caller can be answered."""
    try:
        yield
    except OSError as error:
        raise BackendUnavailable(f"cannot {what} now: {error}") from error


def forkserver_inputs(options: LocalOptions) -> dict[str, Any]:
    """Return what a fork server is made from, as arguments of `ForkServers`."""
    return {
        "python": options.python,
        "environment": base_environment(common_environment()),
        "config": base_config(),
        "kernels_by": options.kernels_by,
        "preload": options.preload,
    }


def why_not_forked(options: LocalOptions) -> str:
    """Return why no server is forked, or ""."""
    if sys.platform != "linux":
        return f"forking needs Linux, and this is {sys.platform}"
    if options.launch_by == "exec":
        return "forking is turned off (LABKEEPER_LAUNCH_BY=exec)"
    return ""

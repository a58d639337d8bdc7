"""Backend that runs servers as processes of this machine.

Each server has its own directory, `<runtime_dir>/<name>/`, and while it lives a supervisor: a
thread that waits for its readiness and its end, cleans up after it, and reports each step.
"""

from __future__ import annotations

import functools
import os
import secrets
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import structlog
from structlog.contextvars import bound_contextvars

from labkeeper import shortage
from labkeeper.backends.local.accounts import (
    Account,
    check_passage,
    common_environment,
    find_user,
    own_environment,
)
from labkeeper.backends.local.ancestry import Ancestry
from labkeeper.backends.local.cleanup import LIMIT, EarlierDir, clear, strays
from labkeeper.backends.local.echo import Echo
from labkeeper.backends.local.forking import ForkServer
from labkeeper.backends.local.forkserver import remove_dead
from labkeeper.backends.local.launching import Launched, Launcher, ReportPipe
from labkeeper.backends.local.limits import ControlGroups, Enforced
from labkeeper.backends.local.logs import LogFile
from labkeeper.backends.local.memory import free_memory
from labkeeper.backends.local.paths import Paths
from labkeeper.backends.local.ports import hold_port
from labkeeper.backends.local.processes import boot_id
from labkeeper.backends.local.server_dir import Asked, Record, ServerDir
from labkeeper.backends.local.supervisor import ProcessSupervisor, Site
from labkeeper.backends.local.terminals import foregrounds
from labkeeper.backends.local.usage import Meter
from labkeeper.core.access import Caller
from labkeeper.core.errors import BackendRefused, BackendUnavailable
from labkeeper.core.messages import Ended, Fact, Gone, Report, Seen
from labkeeper.core.ports import Capacity
from labkeeper.core.server import Exit, FailureClass, Progress, Stage, StopMethod, Usage
from labkeeper.core.spec import QualifiedName, ServerSpec
from labkeeper.forkserver.marks import MARK
from labkeeper.forkserver.wire import Launch, WireError
from labkeeper.jupyter.client import JupyterClient
from labkeeper.jupyter.config import (
    base_config,
    base_environment,
    launch_config,
    launch_environment,
)
from labkeeper.scrub import TOKEN_BYTES, of_server
from labkeeper.threads import ThreadGroup

_log = structlog.get_logger("labkeeper.backends.local.backend")


class LocalBackend:
    """Runs each server as a process, forked from a fork server or executed.

    See `core.ports.Backend` for the laws.
    """

    def __init__(
        self,
        report: Callable[[Report], None],
        *,
        python: Path,
        runtime_dir: Path,
        log_dir: Path,
        paths: Paths,
        client: JupyterClient,
        launch_by: Literal["fork", "exec"] = "fork",
        umask: int = 0o077,
        log_max_bytes: int = 10 * 1024 * 1024,
        echo_logs: bool = False,
        certificate: tuple[Path, Path] | None = None,
        earlier: Sequence[EarlierDir] = (),
        found_orphans: Callable[[QualifiedName, Collection[int]], None] = lambda _name, _pids: None,
    ) -> None:
        """`found_orphans` is called with processes of an earlier keeper that were ended.

        With a certificate and key, servers use TLS. Servers in `earlier` directories are ended, not
        adopted.
        """
        self._report = report
        self._python = python
        self._paths = paths
        # Resolved, so that a server's mark is the same for keepers that come by another link.
        self._runtime_dir = runtime_dir.resolve()
        self._log_dir = log_dir
        self._client = client
        self._umask = umask
        self._log_max_bytes = log_max_bytes
        self._echo_logs = echo_logs
        self._certificate = certificate
        self._found_orphans = found_orphans
        self._supervisors: dict[QualifiedName, ProcessSupervisor] = {}
        self._groups = ControlGroups(self._runtime_dir)
        self._ancestry = Ancestry(
            {self._runtime_dir: self._groups} | {left.runtime_dir: left.groups for left in earlier}
        )
        self._earlier = {
            name: [left for left in earlier if name in left.names]
            for found in earlier
            for name in found.names
        }
        """Servers still to be ended in earlier runtime directories, by name."""
        self._meter = Meter(self._groups, self._runtime_dir) if sys.platform == "linux" else None
        self._threads = ThreadGroup()
        self._forkserver: ForkServer | None = None
        why_not = "" if launch_by == "fork" else "forking is turned off (LABKEEPER_LAUNCH_BY=exec)"
        if sys.platform != "linux":
            why_not = f"forking needs Linux, and this is {sys.platform}"
        if not why_not:
            self._forkserver = ForkServer(
                self._threads,
                python=python,
                runtime_dir=self._runtime_dir,
                log_dir=log_dir,
                groups=self._groups,
                environment=base_environment(common_environment()),
                config=base_config(),
            )
            self._forkserver.start()
        else:
            # Otherwise the fork server does this.
            self._threads.start("dead-forkservers", remove_dead, self._runtime_dir, self._groups)
        self._launcher = Launcher(python, self._forkserver, why_not)

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
                self._supervise(self._launch(spec, generation, hold), given)
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
            record = self._server_dir(name).read_record()
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
                    self._site(name), record, self._attach(record)
                )
                if not supervisor.process.alive():
                    return supervisor.finish()
                self._supervise(supervisor, given)
        return Seen(answers=supervisor.look())

    def forget(self, name: QualifiedName) -> None:
        """Remove the server's directory and log."""
        self._clear(name)
        self._logfile(name).remove()

    def usage(self, names: Collection[QualifiedName]) -> Mapping[QualifiedName, Usage]:
        """Return the usage of the servers that have a supervisor."""
        if self._meter is None:
            return {}
        supervised = {
            name: supervisor
            for name in names
            if (supervisor := self._supervisors.get(name)) is not None
        }
        return self._meter.measure(
            {name: supervisor.process for name, supervisor in supervised.items()}
        )

    def strays(self, known: Collection[QualifiedName]) -> Collection[QualifiedName]:
        """Return unknown servers with a directory, a marked process or a control group."""
        return (strays(self._runtime_dir, self._groups) | self._earlier.keys()) - set(known)

    def sweep(self, name: QualifiedName) -> None:
        """End all processes under the name; remove its control groups, and its directory if any."""
        report = None
        try:
            record = self._server_dir(name).read_record()
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
            return self._logfile(name).tail(tail)
        except OSError as error:
            raise BackendUnavailable(
                f"cannot read the log of server '{name}': {error.strerror}"
            ) from error

    def programs(self, name: QualifiedName) -> Sequence[str] | None:
        """Return the foreground programs of the server's terminals, read from the process table."""
        supervisor = self._supervisors.get(name)
        return None if supervisor is None else foregrounds(supervisor.process)

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
        return self._logfile(name).follow(tail, live)

    def close(self) -> None:
        """End all threads.

        Servers live on for the next keeper to adopt, and the fork server while it has any.
        """
        self._threads.close()

    # A launch

    def _launch(self, spec: ServerSpec, generation: int, hold: socket.socket) -> ProcessSupervisor:
        name = spec.qualified_name
        server_dir, logfile = self._server_dir(name), self._logfile(name)
        headline = (
            f"[labkeeper] launch {generation} of server '{spec.name}', "
            f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        )
        try:
            Path(spec.root_dir).stat()
            user = find_user(spec)
            if user is not None:
                check_passage(spec, self._runtime_dir)
            bundle = server_dir.prepare(spec, user.ids if user else None)
            limited = self._groups.limit(
                spec.qualified_name, spec.limits, own_user=user is not None
            )
            port, token = hold.getsockname()[1], secrets.token_hex(TOKEN_BYTES)
            request = self._request(
                spec, server_dir, port=port, token=token, bundle=bundle, user=user, limited=limited
            )
            if sys.platform != "linux":
                hold.close()
            with logfile.open(headline) as log:
                site = self._site(spec.qualified_name)
                launched = self._launcher.launch(
                    request, log.fileno(), functools.partial(self._groups.hold, spec.qualified_name)
                )
            record = self._record(spec, generation, launched, limited, port)
            supervisor = ProcessSupervisor.launched(site, record, launched, token=token, hold=hold)
            try:
                server_dir.write_record(record)
            except OSError:
                # It may not have its mark yet.
                supervisor.abort()
                raise
            if launched.reason is not None:
                message = f"JupyterLab is loaded by a new process: {launched.reason}"
                progress = Progress(Stage.STARTING, message)
                self._report(Report(spec.qualified_name, generation, progress))
        except BackendRefused:
            self._clear(spec.qualified_name)
            raise
        except (OSError, ValueError, WireError) as error:
            self._clear(spec.qualified_name)
            if shortage.is_ours(error):
                # Not the server's fault, and temporary.
                raise BackendUnavailable(
                    f"cannot start server '{spec.name}' now: {error}"
                ) from error
            kind = FailureClass.DISK_FULL if shortage.is_full(error) else FailureClass.CONFIG_ERROR
            raise BackendRefused(
                f"cannot start server '{spec.name}': {error}", failure_class=kind
            ) from error
        return supervisor

    def _request(
        self,
        spec: ServerSpec,
        server_dir: ServerDir,
        *,
        port: int,
        token: str,
        bundle: Path | None,
        user: Account | None,
        limited: Enforced,
    ) -> Launch:
        env = launch_environment(
            spec, own_environment(user), runtime_dir=server_dir.jupyter, ca_bundle=bundle
        )
        config = launch_config(
            spec, token=token, port=port, ca_bundle=bundle, certificate=self._certificate
        )
        return Launch(
            server_dir=str(server_dir.path),
            title=f"jupyter-lab (server '{spec.name}' of labkeeper)",
            cwd=spec.root_dir,
            # The mark comes last: readers of /proc that stop at an empty entry have read the rest.
            env={**env, MARK: str(server_dir.path)},
            kernel_env=dict(spec.kernel_env),
            umask=self._umask,
            config=config,
            user=user.ids if user else None,
            cgroups=list(limited.members),
            rlimits=dict(limited.rlimits),
            # Clients that attach to a kernel by its connection file do not know these keys, so only
            # kernels of other users get them.
            encrypt_kernels=user is not None,
        )

    def _record(
        self, spec: ServerSpec, generation: int, launched: Launched, limited: Enforced, port: int
    ) -> Record:
        return Record(
            generation=generation,
            pid=launched.process.pid,
            started=launched.process.started,
            boot=boot_id(),
            gateway=spec.gateway is not None,
            launched_by=launched.by,
            exec_reason=launched.reason,
            forkserver=launched.forkserver,
            limited_by=dict(limited.by),
            asked=Asked(
                hostname=spec.ip,
                port=port,
                base_url=spec.base_url,
                secure=self._certificate is not None,
            ),
        )

    # Supervisors

    def _site(self, name: QualifiedName) -> Site:
        """Return the parts of a supervisor; the echo begins at the log's present end."""
        logfile = self._logfile(name)
        echo = Echo(name, logfile, logfile.size) if self._echo_logs else None
        return Site(
            name,
            self._server_dir(name),
            logfile,
            echo,
            self._groups,
            self._threads,
            self._client,
            self._report,
        )

    def _attach(self, record: Record) -> ReportPipe | None:
        """Have a server's fork server report its end; None if it has no fork server, or a dead one.

        Raises BackendUnavailable.
        """
        if self._forkserver is None or record.forkserver is None:
            return None
        with _unavailable("ask a fork server about its child"):
            report, known = ReportPipe(), False
            try:
                known = self._forkserver.attach(record.forkserver, record.pid, report.writer)
            finally:
                report.close_writer()
                if not known:
                    report.close()
        return report if known else None

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
            or os.path.lexists(self._server_dir(name).path)
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
            found = clear(self._server_dir(name), self._groups)
            for earlier in self._earlier.get(name, ()):
                found |= earlier.clear(name)
        self._earlier.pop(name, None)
        return found

    def _server_dir(self, name: QualifiedName) -> ServerDir:
        return ServerDir(self._runtime_dir / name)

    def _logfile(self, name: QualifiedName) -> LogFile:
        return LogFile(
            self._log_dir / f"{name}.log", max_bytes=self._log_max_bytes, secrets=of_server(name)
        )


@contextmanager
def _unavailable(what: str) -> Iterator[None]:
    """Raise BackendUnavailable instead of OSError, so that the caller can be answered."""
    try:
        yield
    except OSError as error:
        raise BackendUnavailable(f"cannot {what} now: {error}") from error

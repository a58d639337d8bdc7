"""Where a server's directory and log are, and what its supervisor works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from labkeeper.backends.local.echo import Echo
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.logs import LogFile
from labkeeper.backends.local.options import LocalOptions
from labkeeper.backends.local.server_dir import ServerDir
from labkeeper.core.messages import Report
from labkeeper.core.spec import QualifiedName
from labkeeper.jupyter.client import JupyterClient
from labkeeper.scrub import of_server
from labkeeper.threads import ThreadGroup


@dataclass(frozen=True, slots=True)
class Site:
    """The collaborators of a supervisor."""

    name: QualifiedName
    server_dir: ServerDir
    log: LogFile
    echo: Echo | None
    """Repeats the server's log in the keeper's own."""
    groups: ControlGroups
    threads: ThreadGroup
    client: JupyterClient
    report: Callable[[Report], None]


@dataclass(frozen=True, slots=True)
class Sites:
    """Finds a server's directory and log by its name, and makes its site."""

    options: LocalOptions
    groups: ControlGroups
    threads: ThreadGroup
    client: JupyterClient
    report: Callable[[Report], None]

    def server_dir(self, name: QualifiedName) -> ServerDir:
        """Return the directory of a server, which need not exist."""
        return ServerDir(self.options.runtime_dir / name)

    def log(self, name: QualifiedName) -> LogFile:
        """Return the log of a server."""
        return LogFile(
            self.options.log_dir / f"{name}.log",
            max_bytes=self.options.log_max_bytes,
            secrets=of_server(name),
        )

    def site(self, name: QualifiedName) -> Site:
        """Return the collaborators of a supervisor; the echo begins at the log's present end."""
        log = self.log(name)
        return Site(
            name,
            self.server_dir(name),
            log,
            Echo(name, log, log.size) if self.options.echo_logs else None,
            self.groups,
            self.threads,
            self.client,
            self.report,
        )

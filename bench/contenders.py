"""The interface of the contenders: ways to get a JupyterLab server.

All run on this machine, as this user, with a new home directory each, and with Jupyter's defaults
except for the settings in `keepers.py` and `peers.py`.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from environments import Environments
from processes import tail
from progress import BenchError
from web import NO_CONTENT, OK, KernelSocket, request, request_json

POLL: Final = 0.005
"""Seconds between two polls of a server that is not ready."""
STARTUP_TIMEOUT: Final = 60.0
"""Seconds for a keeper or a hub to respond, and for a fork server to warm up."""
LONG_TIMEOUT: Final = 600
"""Seconds for start timeouts, so that a slow burst does not fail."""


@dataclass(slots=True)
class Server:
    """A server that is ready. `url` ends in a slash."""

    name: str
    url: str
    authorization: str
    pid: int = 0
    process: subprocess.Popen[bytes] | None = None

    def connect(self, kernel: str) -> KernelSocket:
        """Open a websocket of a kernel."""
        return KernelSocket(self.url, self.authorization, kernel)


class Skipped(Exception):  # noqa: N818 - the bench goes on without the contender
    """This contender cannot take part; the message says why."""


class Contender:
    """The interface of all contenders. Only `launch` and `stop` are timed."""

    key: ClassVar[str]
    label: ClassVar[str]

    def __init__(self, environments: Environments, server_dir: Path, preload: str = "") -> None:
        """Take modules that kernels are going to import, for contenders that can load them ahead.

        `preload` separates them by commas.
        """
        self.environments = environments
        self.preload = preload
        self.home = server_dir / f"{self.key}-{secrets.token_hex(4)}"
        self.notebooks = self.home / "notebooks"
        self.log = self.home / "log"
        self.notebooks.mkdir(parents=True)

    def environment(self, *environments: Path | None) -> dict[str, str]:
        """Return the environment of a fresh login, with these environments on its PATH."""
        kept = {
            name: os.environ[name]
            for name in ("LANG", "LC_ALL", "TZ", "USER")
            if name in os.environ
        }
        return kept | {"HOME": str(self.home), "PATH": self.environments.path(*environments)}

    def open(self) -> None:
        """Start the services that launch servers, if any."""

    def close(self) -> None:
        """Stop those services."""

    def prepare(self, names: Sequence[str]) -> None:
        """Do the setup of these servers that is not timed, such as creating users."""

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Request a server, and return it when it is ready."""
        raise NotImplementedError

    def identify(self, server: Server) -> None:
        """Set `server.pid`, if `launch` did not."""

    def stop(self, server: Server) -> None:
        """Stop a server; return when the contender reports that it ended, if it does."""
        raise NotImplementedError

    def service_pids(self) -> dict[str, int]:
        """Return the PIDs of the services that run beside the servers, by name."""
        return {}

    def start_kernel(self, server: Server) -> str:
        """Start a kernel; return its id."""
        kernel = request_json(
            "POST", f"{server.url}api/kernels", server.authorization, {"name": "python3"}
        )
        self.check_kernel(kernel)
        return str(kernel["id"])

    def stop_kernel(self, server: Server, kernel: str) -> None:
        """Stop a kernel; raise BenchError if it was not launched as this contender does."""
        url = f"{server.url}api/kernels/{kernel}"
        self.check_kernel(request_json("GET", url, server.authorization))
        request_json("DELETE", url, server.authorization, good=(NO_CONTENT,))

    def check_kernel(self, kernel: dict[str, Any]) -> None:
        """Raise BenchError if a kernel was not launched as this contender does.

        `kernel` is the server's description of it.
        """


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a keeper or a hub responds; raise BenchError if it ends or takes too long."""
    until = time.monotonic() + STARTUP_TIMEOUT
    while True:
        try:
            if request("GET", url, timeout=5)[0] == OK:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > until:
            raise BenchError(f"cannot start {Path(str(process.args[0])).name}:\n{tail(log)}")  # type: ignore[index]
        time.sleep(POLL)

"""labkeeper as a contender, forking and executing."""

from __future__ import annotations

import secrets
import time
from typing import Any, ClassVar, Final

import psutil

from contenders import (
    LONG_TIMEOUT,
    POLL,
    STARTUP_TIMEOUT,
    Contender,
    Server,
    Skipped,
    wait_until_up,
)
from processes import end, mentions, spawn, tail
from progress import BenchError, warn
from web import OK, free_port, request_json, wait_until_ready

_READY: Final = '"keeper is ready"'
"""In the log of a keeper, after the settings that it does not know."""


class Labkeeper(Contender):
    """A keeper; `launch_by` is how it launches servers and kernels, "fork" or "exec"."""

    launch_by: ClassVar[str]
    settings: ClassVar[dict[str, str]] = {}
    """Further ones of the keeper."""

    def open(self) -> None:
        """Start a keeper; in fork mode, wait until it forks servers and kernels, with `preload`."""
        self.boot()
        # One that does not know this setting executes all kernels, and does not report it.
        self._reports_kernels = self._knows("LABKEEPER_KERNELS_BY")
        self._check_launch_method()

    def boot(self) -> None:
        """Start a keeper, and wait until its API responds."""
        self._port, self._token = free_port(), secrets.token_hex(16)
        self._authorization = f"Bearer {self._token}"
        self.state = self.home / "state"
        settings = {
            "LABKEEPER_PORT": str(self._port),
            "LABKEEPER_LAB_PORT": str(free_port()),
            "LABKEEPER_TOKEN": self._token,
            "LABKEEPER_STATE_DIR": str(self.state),
            "LABKEEPER_NOTEBOOK_DIR": str(self.notebooks),
            "LABKEEPER_START_TIMEOUT": str(LONG_TIMEOUT),
            # Measure what the keeper can do, not its limit for one client.
            "LABKEEPER_MAX_REQUEST_RATE": "0",
            "LABKEEPER_LAUNCH_BY": self.launch_by,
            "LABKEEPER_KERNELS_BY": self.launch_by,
            **self.settings,
        }
        if self.preload and self.launch_by == "fork":
            settings["LABKEEPER_PRELOAD"] = self.preload
        command = [str(self.environments.lab / "bin/labkeeper"), "serve", "--log-format", "json"]
        self._keeper = spawn(
            command, self.environment(self.environments.lab) | settings, self.home, self.log
        )
        wait_until_up(f"{self.url}/readyz", self._keeper, self.log)

    def close(self) -> None:
        """Stop the keeper, which stops its servers first."""
        end(self._keeper, self.log)

    @property
    def url(self) -> str:
        """Return the base URL of the keeper."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def authorization(self) -> str:
        """Return the Authorization header of the keeper's owner."""
        return self._authorization

    def launch(self, name: str, poll: float = POLL) -> Server:
        """Create a server. The response implies that it is ready; we still poll it, as for all."""
        answer = request_json(
            "POST", f"{self.url}/api/servers", self._authorization, {"name": name}
        )
        if answer["state"] != "running":
            raise BenchError(f"a server is {answer['state']}, not running")
        if answer["launched_by"] != self.launch_by:
            raise BenchError(
                f"a server was launched by {answer['launched_by']}, not by {self.launch_by}:\n"
                f"{tail(self.log)}"
            )
        server = Server(name, answer["url"], f"token {answer['token']}", answer["pid"])
        wait_until_ready(server.url, server.authorization, poll=poll)
        return server

    def stop(self, server: Server) -> None:
        """Delete the server; the response proves that it is gone."""
        request_json(
            "DELETE", f"{self.url}/api/servers/{server.name}", self._authorization, good=(OK,)
        )

    def service_pids(self) -> dict[str, int]:
        """Return the PIDs of the keeper, of the fork server and of the kernel loader."""
        found = {"keeper": self._keeper.pid}
        if self.launch_by == "fork":
            found["fork server"] = _child(self._keeper.pid, "forkserver")
            if self._reports_kernels:
                found["kernel loader"] = _child(found["fork server"], "kernel-loader")
        return found

    def check_kernel(self, kernel: dict[str, Any]) -> None:
        """Raise BenchError if a kernel was forked in exec mode, or executed in fork mode."""
        if self._reports_kernels and kernel.get("launched_by") != self.launch_by:
            raise BenchError(
                f"a kernel was launched by {kernel.get('launched_by')}, not by {self.launch_by}: "
                f"{kernel.get('exec_reason')}\n{tail(self.log)}"
            )

    def _check_launch_method(self) -> None:
        """Check that this keeper launches as configured; raise Skipped if it cannot fork."""
        if self.launch_by == "exec":
            return
        if not self._knows("LABKEEPER_LAUNCH_BY"):
            raise Skipped("this labkeeper cannot fork: it has no LABKEEPER_LAUNCH_BY")
        if self.preload and not self._knows("LABKEEPER_PRELOAD"):
            warn(f"{self.label} cannot preload {self.preload}: it has no LABKEEPER_PRELOAD")
        until = time.monotonic() + STARTUP_TIMEOUT
        while not (self._has_preloaded() and self._trial()):
            if time.monotonic() > until:
                raise BenchError(
                    f"the keeper has not forked a server and a kernel within "
                    f"{STARTUP_TIMEOUT:.0f} s:\n{tail(self.log)}"
                )
            time.sleep(0.2)

    def _has_preloaded(self) -> bool:
        """Return whether all libraries are loaded; raise BenchError if one is refused."""
        libraries = request_json("GET", f"{self.url}/readyz").get("preload", [])
        for library in libraries:
            if library["loaded"] is False:
                raise BenchError(f"{library['name']} is not preloaded: {library['reason']}")
        return all(library["loaded"] for library in libraries)

    def _trial(self) -> bool:
        """Run a server with a kernel; return whether both were forked."""
        servers = f"{self.url}/api/servers"
        server = request_json("POST", servers, self._authorization, {"name": "trial"})
        launches = [server["launched_by"]]
        if self._reports_kernels:
            authorization = f"token {server['token']}"
            kernel = request_json("POST", f"{server['url']}api/kernels", authorization, {})
            launches.append(kernel["launched_by"])
        request_json("DELETE", f"{servers}/trial", self._authorization, good=(OK,))
        return set(launches) == {"fork"}

    def _knows(self, setting: str) -> bool:
        """Return whether the keeper has a setting; it logs those that it does not know."""
        until = time.monotonic() + STARTUP_TIMEOUT
        while _READY not in (log := self.log.read_text(errors="replace")):
            if time.monotonic() > until:
                raise BenchError(f"the keeper has not logged that it is ready:\n{log}")
            time.sleep(POLL)
        return f'"{setting}"' not in log


class LabkeeperFork(Labkeeper):
    """Servers and kernels forked from processes that have already imported Jupyter."""

    key = "labkeeper_fork"
    label = "labkeeper"
    launch_by = "fork"


class LabkeeperExec(Labkeeper):
    """Servers and kernels that each load Jupyter themselves."""

    key = "labkeeper_exec"
    label = "labkeeper, exec"
    launch_by = "exec"


def _child(pid: int, word: str) -> int:
    """Return the PID of the only child of a process whose command line contains a word."""
    children = psutil.Process(pid).children()
    found = [child.pid for child in children if mentions(child, word)]
    if len(found) != 1:
        raise BenchError(f"cannot tell which process is the {word}: found {len(found)}")
    return found[0]

"""Kernels of a real server, how they were launched, and the processes that fork them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import httpx
import psutil

from harness import (
    PATIENCE,
    KeeperProcess,
    forked,
    parent_of,
    processes_where,
    run_cell,
    start_kernel,
    until,
)
from labkeeper.forkserver.marks import MARK

SPARE = "jupyter-lab (waits for its launch)"
LOADER = "kernel-loader (of labkeeper)"


def title_of_zygote(name):
    return f"kernel-zygote (server '{name}' of labkeeper)"


def titled(process, title):
    with contextlib.suppress(psutil.Error, OSError):
        return process.cmdline()[:1] == [title]
    return False


def mark_of(process):
    """Return the mark of the server that a process belongs to, or nothing."""
    with contextlib.suppress(psutil.Error, OSError):
        # It is padded with what was there before.
        return psutil.Process(process.pid).environ().get(MARK, "").strip()
    return ""


def exists(pid):
    """Return whether a process exists, if only as a zombie."""
    return psutil.pid_exists(pid)


def wait_for_end_of(*pids):
    """Wait until processes are gone: no zombie of them is left, either."""
    until(
        lambda: not any(map(exists, pids)),
        what=lambda: f"{[pid for pid in pids if exists(pid)]} to be gone",
    )


# Processes


def find_zygote(server):
    """Return the zygote of a server, or None."""
    mark = mark_of(psutil.Process(server["pid"]))
    found = processes_where(
        lambda process: (
            titled(process, title_of_zygote(server["name"])) and mark_of(process) == mark
        )
    )
    return next(iter(found), None)


def zygote_of(server):
    """Wait for the zygote of a server, and return it."""
    return until(lambda: find_zygote(server), what=f"a zygote of {server['name']}")


def find_loader(server):
    """Return the kernel loader of the fork server of a server, or None."""
    found = [
        process
        for process in psutil.Process(parent_of(server)).children()
        if titled(process, LOADER)
    ]
    return next(iter(found), None)


# Keepers


class ForkingKeeper(KeeperProcess):
    """A keeper whose servers fork, and find kernelspecs in a directory of its own."""

    def __init__(self, base, **settings):
        super().__init__(base, **{"launch_by": "fork"} | settings)
        self.data_dir = base / "share"
        self.variables["JUPYTER_PATH"] = self.data_dir
        # The end of a kernel is noticed without Jupyter's polling, or not at all.
        self.configure_jupyter("c.KernelRestarter.time_to_dead = 1e6")

    def install_kernelspec(self, name, argv, **more):
        """Install a kernelspec."""
        directory = self.data_dir / "kernels" / name
        directory.mkdir(parents=True, exist_ok=True)
        spec = {"argv": [str(part) for part in argv], "display_name": name, "language": "python"}
        (directory / "kernel.json").write_text(json.dumps(spec | more))

    def close(self):
        super().close()
        assert not (left := self.left_of_fork_servers()), left

    def left_of_fork_servers(self):
        """Return the live processes of its fork servers: they work below its runtime directory."""
        place = f"{self.server_dirs}/"
        return processes_where(lambda process: process.cwd().startswith(place))


def delete_servers(keeper):
    for server in keeper.http.get("/api/servers").json()["servers"]:
        assert keeper.delete(server["name"], force="true").status_code == 200


def ready_to_fork(keeper, name="default", **body):
    """Start a forked server, and wait until it can fork kernels."""
    server = forked(keeper, name, **body)
    zygote_of(server)
    return server


# Kernels


def ask(server, method, path, **body):
    """Send a request to a server's own API."""
    answer = httpx.request(
        method,
        f"{server['url']}api/{path}",
        headers={"Authorization": f"token {server['token']}"},
        json=body or None,
        timeout=PATIENCE,
        trust_env=False,
    )
    assert answer.is_success, answer.text
    return answer.json() if answer.content else None


def launched(server, kernel):
    """Return how a kernel was launched, and the reason; nothing if its server does not tell."""
    model = ask(server, "GET", f"kernels/{kernel}")
    return tuple(model[field] for field in ("launched_by", "exec_reason") if field in model)


def fork_kernel(server, **given):
    """Start a kernel, which must be forked; return its id and its pid."""
    kernel = start_kernel(server, **given)
    assert launched(server, kernel) == ("fork", None)
    return kernel, pid_of(server, kernel)


def pid_of(server, kernel):
    """Return the pid of a kernel; it has run a cell then."""
    return int(run_cell(server, kernel, "import os; os.getpid()"))


def run_source(server, kernel, source):
    """Run a cell that prints JSON, and return that."""
    return json.loads(run_cell(server, kernel, source))


def connection_file(keeper, server, kernel):
    return Path(keeper.server_dirs, server["name"], "jupyter", f"kernel-{kernel}.json")


def processes_of(keeper, name="default"):
    """Return the pids of the live processes that belong to a server."""
    mark = os.fspath(keeper.server_dirs / name)
    return {process.pid for process in processes_where(lambda found: mark_of(found) == mark)}


def kernel_processes(keeper):
    """Return the pids of the kernels of all servers, without those that are only rehearsed."""
    place = f"{keeper.server_dirs}/"
    return {
        process.pid
        for process in processes_where(
            lambda found: any(
                part.startswith(place) and "/kernel-" in part for part in found.cmdline()
            )
        )
    }

"""The world of the chaos tests: a keeper, all of its processes and files, and what they must be.

A test derives its own world, which disturbs this one in rounds. After each round, once everything
is at rest, the API is compared with the actual processes and files.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from chaos_facts import is_zombie, process_info, resource_counts, unknown_files_in
from harness import PATIENCE, KeeperProcess, everything_below, port_is_free, until

SEED = os.environ["SEED"]
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "10"))
"""Number of rounds of each kind."""
CONVERGES_WITHIN = 30.0
"""Seconds until processes and files must match the API once it is at rest.

Zombies and the logs of deleted servers disappear with a delay.
"""
RESTING_STATES = {"running", "stopped", "failed"}
KILL_CLASSES = {"killed", "other"}
"""Failure classes that a kill may lead to; it is `other` if the exit status is unknown."""
MAX_RESTARTS = 3
"""Restarts after which a server that was ready once has failed."""
STATE_FILES = {
    "keeper.lock",
    "keeper.json",
    "keeper.sock",
    "token",
    "labkeeper.sqlite",
    "labkeeper.sqlite-shm",
    "labkeeper.sqlite-wal",
    "logs",
    "run",
}


class World:
    """A keeper, and all of its processes and files."""

    def __init__(self, base, seed):
        # On a full disk requests are refused at once, so all callers together would exceed
        # the default rate limit of a token.
        self.keeper = self.keeper_in(
            base,
            launch_by="fork",
            # It would hold and repeat requests, and hide what the keeper answers.
            edge="off",
            stop_grace=2,
            kill_wait=1,
            probe_period=0.5,
            start_timeout=40,
            hung_after=60,
            max_request_rate=0,
        )
        self.seed = seed
        self.ports = {}
        """Ports that were requested, by name."""
        self.keeper.port = port_outside_ephemeral_range()
        self.killed = collections.Counter()
        """How many processes of each kind were killed."""
        self.traces = collections.deque(maxlen=400)
        self.violations = []
        self.sizes = []
        self.started_at = time.monotonic()

    def keeper_in(self, base, **settings):
        return KeeperProcess(base, **settings)

    def trace(self, text):
        self.traces.append(f"{time.monotonic() - self.started_at:8.3f} {text}")

    def record_violation(self, text):
        self.trace(f"VIOLATION: {text}")
        self.violations.append(text)

    # Actual state

    def processes(self):
        server_dirs = os.fsencode(self.keeper.server_dirs.resolve())
        place = f"{self.keeper.server_dirs.resolve()}/.forkservers/"
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError):
                    seen = process_info(int(entry.name), server_dirs, place)
                    if seen is not None:
                        found.append(seen)
        return found

    def zombies(self, parents):
        found = []
        for pid in parents:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(pid).children()
                found.extend(child.pid for child in children if is_zombie(child))
        return found

    def servers(self):
        return {
            server["name"]: server
            for server in self.keeper.http.get("/api/servers").raise_for_status().json()["servers"]
        }

    # Disturbances

    def kill_process(self, kind, pid):
        self.killed[kind] += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def kill_keeper(self, rng):
        self.trace(f"kill -9 keeper {self.keeper.process.pid}")
        self.keeper.kill()
        while rng.random() < 0.25:
            # Kill it during startup, too.
            with self.keeper.log.open("ab") as log:
                keeper = subprocess.Popen(
                    self.keeper.command("serve"),
                    env=self.keeper.environment,
                    stdout=log,
                    stderr=log,
                )
            time.sleep(rng.uniform(0.0, 0.8))
            assert keeper.poll() is None, "the keeper exited during startup"
            keeper.kill()
            keeper.wait()
            self.trace(f"kill -9 keeper {keeper.pid} during startup")
        time.sleep(rng.uniform(0.0, 0.1))
        self.keeper.start()
        self.trace(f"keeper {self.keeper.process.pid} is ready")

    def prepare(self):
        """Create what has to exist before the first round."""

    # Rounds

    def round(self, number):
        """Disturb the world, and wait until it has settled."""
        raise NotImplementedError

    def settle(self, *, wholly=False):
        """Wait until everything is at rest, then compare."""

        def at_rest():
            servers = self.servers().values()
            return not [s for s in servers if not _is_at_rest(s, wholly)]

        until(at_rest, what="all servers to be at rest")
        end = time.monotonic() + CONVERGES_WITHIN
        while differences := [*self.differences()]:
            assert time.monotonic() < end, "\n".join(differences)
            time.sleep(0.05)
        assert not self.violations, self.violations

    # Comparison

    def differences(self):
        servers = self.servers()
        processes = self.processes()
        keeper = self.keeper.process.pid
        forkservers = {seen.pid: seen for seen in processes if seen.kind == "forkserver"}
        for name, server in servers.items():
            yield from self.false_states(server, [seen for seen in processes if seen.name == name])
        running = {name for name, server in servers.items() if server["state"] == "running"}
        for seen in processes:
            if seen.kind in {"server", "zygote", "kernel"} and seen.name not in running:
                yield f"stray process: {seen}"
        yield from self.goal_mismatches(servers)
        yield from self.unknown_files(servers, forkservers.values())
        yield from (f"zombie process: {pid}" for pid in self.zombies({keeper, *forkservers}))
        yield from self.stray_forkservers(processes)
        yield from self.leaks(keeper, len(running), forkservers)

    def false_states(self, server, processes):
        name, state, pid = server["name"], server["state"], server["pid"]
        if state == "failed":
            kind, end = server["failure"]["failure_class"], server["failure"]["exit"] or {}
            if not self.may_fail(kind, end):
                yield f"'{name}' failed for a reason other than a kill: {server['failure']}"
            if server["started_at"] is not None and server["restarts"] < MAX_RESTARTS:
                yield f"'{name}' was ready once, but failed after {server['restarts']} restarts"
        if state != "running":
            if pid is not None or server["port"] is not None:
                yield f"'{name}' is {state} but has an endpoint"
            if processes:
                yield f"'{name}' is {state} but has processes: {processes}"
        else:
            yield from self.running_mismatches(server, processes)

    def may_fail(self, kind, end):
        return kind in KILL_CLASSES and not (kind == "other" and end.get("code") is not None)

    def running_mismatches(self, server, processes):
        name, pid = server["name"], server["pid"]
        own = [seen.pid for seen in processes if seen.kind == "server"]
        if own != [pid]:
            yield f"'{name}' is reported with pid {pid}, but has processes: {processes}"
            return
        if name in self.ports and server["port"] != self.ports[name]:
            yield f"'{name}' has port {server['port']}, but {self.ports[name]} was requested"
        with contextlib.suppress(psutil.Error):
            sockets = psutil.Process(pid).net_connections("tcp")
            if server["port"] not in {
                s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN
            }:
                yield f"'{name}' does not listen on its port {server['port']}"
        try:
            answer = httpx.get(
                f"{server['url']}api/me",
                headers={"Authorization": f"token {server['token']}"},
                trust_env=False,
                timeout=PATIENCE,
            )
            if answer.status_code != 200:
                yield f"'{name}' returns {answer.status_code}"
        except httpx.HTTPError as error:
            yield f"'{name}' does not respond: {error!r}"
        yield from self.record_mismatches(server)

    def record_mismatches(self, server):
        server_dir = self.keeper.server_dirs / server["name"]
        try:
            record = json.loads((server_dir / "launch.json").read_text())
        except OSError as error:
            yield f"no launch record: {error}"
            return
        facts = {
            key: record[key] for key in ("pid", "generation", "launched_by", "exec_reason", "ready")
        }
        reported = {
            key: server[key] for key in ("pid", "generation", "launched_by", "exec_reason")
        } | {"ready": True}
        if facts != reported:
            yield f"the launch record has {facts}, the API reports {reported}"
        if (record["forkserver"] is None) != (server["launched_by"] == "exec"):
            yield (
                f"'{server['name']}' was launched by {server['launched_by']},"
                f" but its recorded fork server is {record['forkserver']}"
            )
        allowed = re.compile(
            rf"jpserver-{server['pid']}\.json|kernel-[0-9a-f-]+\.json|kernels\.json(\.\d+)?|tmp\w{{8}}"
        )
        known = {"launch.json", "jupyter"}
        left = [path.name for path in server_dir.iterdir() if path.name not in known]
        left += [
            path.name
            for path in (server_dir / "jupyter").iterdir()
            if not allowed.fullmatch(path.name)
        ]
        if left:
            yield f"unexpected files in the server directory of '{server['name']}': {left}"

    def goal_mismatches(self, servers):
        for name, server in servers.items():
            up = server["state"] in {"running", "backoff", "failed"}
            if (server["goal"] == "up") != up:
                yield f"'{name}' is {server['state']}, but its goal is {server['goal']}"
            log = self.keeper.state_dir / "logs" / f"{name}.log"
            launches = re.findall(
                r"^\[labkeeper\] launch (\d+) of",
                log.read_text() if log.exists() else "",
                re.MULTILINE,
            )
            if len(launches) != len(set(launches)):
                yield f"'{name}' has two launches with the same number: {launches}"

    def unknown_files(self, servers, forkservers):
        state, server_dirs = self.keeper.state_dir, self.keeper.server_dirs
        logs = {f"{name}.log" for name in (*servers, "_forkserver")}
        running = {name for name, server in servers.items() if server["state"] == "running"}
        places = {seen.name for seen in forkservers}
        yield from unknown_files_in(state, STATE_FILES)
        yield from unknown_files_in(state / "logs", logs | {f"{log}.1" for log in logs})
        yield from unknown_files_in(server_dirs, running | {".forkservers", "keeper.lock"})
        yield from unknown_files_in(server_dirs / ".forkservers", places)
        yield from unknown_files_in(self.keeper.notebook_dir, set())
        rehearsed = set(server_dirs.glob(".forkservers/*/tmp*"))
        for place in places:
            known = {"socket", "rehearsal.json", "rehearsal", *(path.name for path in rehearsed)}
            yield from unknown_files_in(server_dirs / ".forkservers" / place, known)
        rehearsed.update(server_dirs.glob("*/jupyter/tmp*"))
        # What is killed while it rehearses a kernel leaves a directory, which is removed later.
        if len(rehearsed) > self.killed["loader"] + self.killed["zygote"]:
            yield f"directories of rehearsed kernels: {rehearsed}"

    def stray_forkservers(self, processes):
        forkservers = [seen for seen in processes if seen.kind == "forkserver"]
        parents = {seen.parent for seen in processes if seen.kind == "server"}
        idle = [seen for seen in forkservers if seen.pid not in parents]
        if len(idle) > 1:
            yield f"more than one fork server without servers: {idle}"
        serving = {seen.pid for seen in processes if seen.kind in {"forkserver", "loader"}}
        for seen in processes:
            if seen.kind in {"spare", "loader", "rehearsal"} and seen.parent not in serving:
                yield f"process without its fork server: {seen}"

    def leaks(self, keeper, running, forkservers):
        """Yield resource counts that are too high for the number of servers, and so show a leak."""
        files, threads = resource_counts(keeper)
        self.sizes.append(
            (running, files, threads, *(resource_counts(pid)[0] for pid in forkservers))
        )
        if files > 60 + 6 * running or threads > 180 + 3 * running:
            yield f"the keeper has {files} open files and {threads} threads for {running} servers"
        for pid in forkservers:
            if resource_counts(pid)[0] > 30 + 2 * running:
                yield (
                    f"fork server {pid} has {resource_counts(pid)[0]} open files"
                    f" for at most {running} servers"
                )

    # Report of a failure

    def describe(self):
        keeper = self.keeper
        try:
            listed = json.dumps(
                keeper.http.get("/api/servers", timeout=5).json()["servers"], indent=1
            )
        except (httpx.HTTPError, ValueError, AttributeError, RuntimeError) as error:
            listed = repr(error)
        log = (
            keeper.log.read_text(errors="replace").splitlines()[-150:]
            if keeper.log.exists()
            else []
        )
        return "\n".join(
            [
                f"seed {self.seed}",
                f"servers, keeper's files and threads, fork servers' files: {self.sizes[-1:]}",
                "--- trace",
                *self.traces,
                "--- the API",
                listed,
                "--- processes",
                *map(str, self.processes()),
                "--- files",
                *(str(found.path) for found in everything_below(keeper.server_dirs)),
                "--- the keeper's log",
                *log,
            ]
        )


def port_outside_ephemeral_range():
    """Return a free port that is not assigned to connections, and so stays free after a kill."""
    return next(
        port
        for port in random.Random(os.getpid() + time.time_ns()).sample(range(15000, 32000), 1000)
        if port_is_free(port)
    )


def _is_at_rest(server, wholly):
    # The second backoff is longer than a round, so it counts as rest, except at the end.
    return server["state"] in RESTING_STATES or (
        server["state"] == "backoff" and server["restarts"] >= 1 and not wholly
    )


def run_rounds(world, rounds=ROUNDS):
    """Run rounds; if one fails, report the trace, the API, processes, files and the log."""
    number = 0
    try:
        world.keeper.start()
        until(
            lambda: any(seen.kind == "spare" for seen in world.processes()),
            what="a fork server to be ready",
        )
        world.prepare()
        for number in range(rounds):
            world.round(number)
        world.settle(wholly=True)
    except BaseException as error:
        if not isinstance(error, Exception):
            raise
        pytest.fail(
            f"round {number}: {error}\n{world.describe()}",
            pytrace=not isinstance(error, AssertionError),
        )
    finally:
        if world.keeper.process is not None and sys.exc_info()[0] is not None:
            world.keeper.process.kill()
            world.keeper.process.wait()
        world.keeper.close()

"""Kill processes and exhaust resources under load, then check that the API matches reality.

Nothing may be lost, duplicated or left behind. Each round puts the keeper under load and kills
processes meanwhile, or makes processes, descriptors or disk space scarce for a while. Once
everything is at rest, it compares the API with the actual processes and files. A seed determines
the plan. The effects depend on the machine, so a seed does not always reproduce a failure.

    SEED=7 CHAOS_ROUNDS=1000 pytest tests/chaos/test_chaos.py
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from harness import PATIENCE, KeeperProcess, everything_below, port_is_free, start_kernel, until
from shortages import Disk, Group, GroupedKeeper, needs_group

SEED = os.environ["SEED"]
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "10"))
"""Number of rounds of each kind."""
KILL_MIXES = {
    "everything": {
        "keeper": 0.35,
        "forkserver": 0.06,
        "spare": 0.2,
        "server": 0.6,
        "kernel": 0.3,
        "rehearsal": 0.1,
    },
    "keepers": {"keeper": 1.0, "server": 0.3, "kernel": 0.1},
    "servers": {"server": 1.0, "kernel": 0.5, "spare": 0.3, "forkserver": 0.03},
    "forkservers": {
        "forkserver": 0.16,
        "spare": 0.5,
        "rehearsal": 0.3,
        "keeper": 0.4,
        "server": 0.3,
    },
}
"""Probability that a round kills processes of each kind.

In `servers` the keeper is never killed, so that its leaks show.
"""
SHORTAGE = {"shortage": 1.0, "server": 0.4, "kernel": 0.2}
"""Every round has a shortage. The keeper is not killed: unsaved changes would be lost with it."""
LOAD_SECONDS = (0.2, 0.6)
SHORTAGE_SECONDS = (0.3, 1.5)
"""Duration of a shortage."""
CONVERGES_WITHIN = 30.0
"""Seconds until processes and files must match the API once it is at rest.

Zombies and the logs of deleted servers disappear with a delay.
"""
EXCLUSIVE_NAMES = (("one", "two"), ("three", "four"), ("five", "fixed"))
"""Names by caller: each caller has exclusive use of its names, and knows their expected state."""
SHARED_NAME = "shared"
"""The name that all other callers compete for."""
RESTING_STATES = {"running", "stopped", "failed"}
SUCCESS = {200, 201, 202}
OUT_OF_SPACE = {502, 503}
"""Status codes of requests that fail for lack of resources, before or after they were recorded."""
UNDISTURBED = "still"
"""The name that is neither killed nor requested, and must keep running through any shortage."""
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

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@dataclass(frozen=True)
class ProcessInfo:
    """A process that belongs to the keeper's runtime directory, as /proc shows it."""

    pid: int
    parent: int
    kind: str
    """server, kernel (or any other child of a server), forkserver, spare or rehearsal."""
    name: str
    """Name of its server, or of the directory of its fork server."""
    zombie: bool


@dataclass
class Expectation:
    """What the exclusive caller of a name knows about it; None means unknown."""

    exists: bool | None = False
    up: bool | None = None


class World:
    """A keeper, all of its processes and files, and what its callers expect of it."""

    def __init__(self, base, seed, mix):
        # On a full disk requests are refused at once, so all callers together would exceed
        # the default rate limit of a token.
        self.keeper = self.keeper_in(
            base,
            launch_by="fork",
            stop_grace=2,
            kill_wait=1,
            probe_period=0.5,
            start_timeout=40,
            hung_after=60,
            max_request_rate=0,
        )
        self.seed = seed
        self.mix = mix
        self.expectations = {name: Expectation() for names in EXCLUSIVE_NAMES for name in names}
        self.ports = {"fixed": _port_outside_ephemeral_range()}
        self.keeper.port = _port_outside_ephemeral_range()
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
                    seen = _process_info(int(entry.name), server_dirs, place)
                    if seen is not None:
                        found.append(seen)
        return found

    def zombies(self, parents):
        found = []
        for pid in parents:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(pid).children()
                found.extend(child.pid for child in children if _is_zombie(child))
        return found

    def servers(self):
        return {
            server["name"]: server
            for server in self.keeper.http.get("/api/servers").raise_for_status().json()["servers"]
        }

    # Disturbances

    def disturb(self, kind, rng):
        self.kill(kind, rng)

    def kill(self, kind, rng):
        """Kill some of the existing processes of a kind."""
        if kind == "keeper":
            self.kill_keeper(rng)
            return
        there = sorted(
            {
                seen.pid
                for seen in self.processes()
                if seen.kind == kind and seen.name != UNDISTURBED
            }
        )
        chosen = rng.sample(there, rng.randint(1, len(there))) if there else []
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.trace(f"kill -9 {kind} {chosen or '(none found)'}")

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
        rng = random.Random(f"{self.seed}/{number}")
        self.trace(f"round {number}")
        load = rng.uniform(*LOAD_SECONDS)
        plan = [
            (rng.uniform(0.0, load), kind)
            for kind, chance in self.mix.items()
            if rng.random() < chance
        ]
        over = threading.Event()
        names = [*EXCLUSIVE_NAMES, (SHARED_NAME,), (SHARED_NAME,)]
        if not any(seen.kind == "spare" for seen in self.processes()):
            # Without a fork server each start takes over a second of CPU time: send fewer requests.
            names = rng.sample(names, 2)
        callers = [
            Caller(self, each, random.Random(f"{self.seed}/{number}/{at}"), over)
            for at, each in enumerate(names)
        ]
        watcher = threading.Thread(target=self.watch, args=(over,))
        started_at = time.monotonic()
        for thread in (*callers, watcher):
            thread.start()
        try:
            for moment, kind in sorted(plan):
                time.sleep(max(0.0, started_at + moment - time.monotonic()))
                self.disturb(kind, rng)
            time.sleep(max(0.0, started_at + load - time.monotonic()))
        finally:
            over.set()
            for thread in (*callers, watcher):
                thread.join()
        self.settle()

    def watch(self, over):
        """Check continuously that no name has two server processes."""
        before = set()
        while not over.wait(0.1):
            by_name = collections.defaultdict(set)
            seen = [each for each in self.processes() if each.kind == "server" and not each.zombie]
            parents = {each.pid: each.parent for each in seen}
            for each in seen:
                # A child of a server looks like a server until it executes the kernel.
                if each.parent not in parents:
                    by_name[each.name].add(each.pid)
            doubles = {(name, *sorted(pids)) for name, pids in by_name.items() if len(pids) > 1}
            for name, *pids in doubles & before:
                self.record_violation(f"'{name}' has more than one server process: {pids}")
            before = doubles

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
            if seen.kind in {"server", "kernel"} and seen.name not in running:
                yield f"stray process: {seen}"
        yield from self.unmet_expectations(servers)
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

    def may_refuse(self):
        """Return whether requests may be refused for lack of resources."""
        return False

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
            rf"jpserver-{server['pid']}\.json|kernel-[0-9a-f-]+\.json|kernels\.json(\.\d+)?"
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

    def unmet_expectations(self, servers):
        """Yield what differs from the callers' expectations."""
        for name, expectation in self.expectations.items():
            server = servers.get(name)
            if expectation.exists is not None and expectation.exists != (server is not None):
                yield f"'{name}' {'is lost' if expectation.exists else 'exists after its deletion'}"
            elif (
                server is not None
                and expectation.up is not None
                and (server["goal"] == "up") != expectation.up
            ):
                yield (
                    f"'{name}' should be {'up' if expectation.up else 'down'},"
                    f" but its goal is {server['goal']}"
                )
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
        yield from _unknown_files_in(state, STATE_FILES)
        yield from _unknown_files_in(state / "logs", logs | {f"{log}.1" for log in logs})
        yield from _unknown_files_in(server_dirs, running | {".forkservers", "keeper.lock"})
        yield from _unknown_files_in(server_dirs / ".forkservers", places)
        yield from _unknown_files_in(self.keeper.notebook_dir, set())
        for place in places:
            yield from _unknown_files_in(
                server_dirs / ".forkservers" / place, {"socket", "rehearsal.json", "rehearsal"}
            )

    def stray_forkservers(self, processes):
        forkservers = [seen for seen in processes if seen.kind == "forkserver"]
        parents = {seen.parent for seen in processes if seen.kind == "server"}
        idle = [seen for seen in forkservers if seen.pid not in parents]
        if len(idle) > 1:
            yield f"more than one fork server without servers: {idle}"
        serving = {seen.pid for seen in forkservers}
        for seen in processes:
            if seen.kind in {"spare", "rehearsal"} and seen.parent not in serving:
                yield f"process without its fork server: {seen}"

    def leaks(self, keeper, running, forkservers):
        """Yield resource counts that are too high for the number of servers, and so show a leak."""
        files, threads = _resource_counts(keeper)
        self.sizes.append(
            (running, files, threads, *(_resource_counts(pid)[0] for pid in forkservers))
        )
        if files > 60 + 6 * running or threads > 60 + 3 * running:
            yield f"the keeper has {files} open files and {threads} threads for {running} servers"
        for pid in forkservers:
            if _resource_counts(pid)[0] > 30 + 2 * running:
                yield (
                    f"fork server {pid} has {_resource_counts(pid)[0]} open files"
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


class ShortageWorld(World):
    """A world with a shortage in every round."""

    def __init__(self, base, seed, mix):
        super().__init__(base, seed, mix)
        self.undisturbed = None
        """The server that must keep running, as it was after its start."""

    def prepare(self):
        self.undisturbed = self.keeper.post(name=UNDISTURBED).json()
        start_kernel(self.undisturbed)

    def disturb(self, kind, rng):
        if kind != "shortage":
            super().disturb(kind, rng)
            return
        spare, seconds = rng.randint(0, 4), rng.uniform(*SHORTAGE_SECONDS)
        self.trace(f"shortage for {seconds:.1f} s, with {spare} units to spare")
        self.take(spare)
        time.sleep(seconds)
        self.give_back()
        self.trace("shortage over")

    def take(self, spare):
        """Use up a resource, except for `spare` units."""
        raise NotImplementedError

    def give_back(self):
        raise NotImplementedError

    def settle(self, *, wholly=False):
        assert self.keeper.process.poll() is None, "the keeper has exited"
        super().settle(wholly=wholly)
        until(
            lambda: self.keeper.http.get("/readyz").status_code == 200,
            what="the keeper to be ready again",
        )
        # Servers that failed for lack of resources can be started again.
        for name, server in self.servers().items():
            if server["state"] == "failed":
                answer = self.keeper.post(f"/{name}/start")
                assert answer.status_code in SUCCESS, (
                    f"start {name}: {answer.status_code} {answer.text}"
                )
                if name in self.expectations:
                    self.expectations[name].up = True

    def differences(self):
        yield from super().differences()
        undisturbed = self.servers()[UNDISTURBED]
        if (undisturbed["pid"], undisturbed["generation"]) != (
            self.undisturbed["pid"],
            self.undisturbed["generation"],
        ):
            yield f"'{UNDISTURBED}' was undisturbed, but did not survive: {undisturbed}"

    def may_fail(self, kind, end):
        return True

    def may_refuse(self):
        return True

    def close(self):
        """Release the resources of this world."""


class FewPids(ShortageWorld):
    """A shortage of processes and threads, for the keeper and its servers together."""

    def keeper_in(self, base, **settings):
        self.group = Group()
        return GroupedKeeper(base, self.group, **settings)

    def take(self, spare):
        self.group.allow(self.group.count + spare)

    def give_back(self):
        self.group.allow("max")

    def close(self):
        self.group.remove()


class FewDescriptors(ShortageWorld):
    """A shortage of descriptors in the keeper."""

    def take(self, spare):
        pid = self.keeper.process.pid
        highest = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
        self.before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1 + spare, self.before[1]))

    def give_back(self):
        resource.prlimit(self.keeper.process.pid, resource.RLIMIT_NOFILE, self.before)


class FullDisk(ShortageWorld):
    """No space on the disk of the keeper, its servers and their logs."""

    def __init__(self, base, seed, mix):
        super().__init__(base, seed, mix)
        self.disk = Disk(base.parent / "disk")
        self.keeper.state_dir = self.disk.path / "state"

    def take(self, spare):
        self.disk.fill()

    def give_back(self):
        self.disk.free()

    def close(self):
        self.disk.remove()


class Caller(threading.Thread):
    """Send requests about some names, and record what to expect of them."""

    def __init__(self, world, names, rng, over):
        super().__init__()
        self.world = world
        self.names = names
        self.rng = rng
        self.over = over
        self.expectations = world.expectations if names[0] in world.expectations else None

    def run(self):
        token = self.world.keeper.token
        with httpx.Client(
            base_url=self.world.keeper.url,
            headers={"Authorization": f"Bearer {token}"},
            trust_env=False,
            timeout=PATIENCE,
        ) as self.http:
            while not self.over.is_set():
                try:
                    self.step()
                except Exception as error:  # noqa: BLE001 - reported by the test's own thread
                    self.world.record_violation(f"a caller failed: {error!r}")
                time.sleep(self.rng.uniform(0.0, 0.05))

    def step(self):
        name = self.rng.choice(self.names)
        expectation = self.expectations[name] if self.expectations else Expectation(exists=None)
        if expectation.exists is False:
            order = "create"
        else:
            order = self.rng.choice(["create", "start", "restart", "stop", "delete", "kernel"])
        if order == "kernel":
            self.start_kernel(name)
            return
        answer = self.send(order, name)
        if answer is None:
            # The keeper may have received the request.
            if expectation.exists is not True or order == "delete":
                expectation.exists = None
            expectation.up = None
        elif answer is not False:
            self.update_expectation(order, name, expectation, answer)

    def send(self, order, name):
        """Send a request; return None if its outcome is unknown, False if it was not received."""
        body = {"name": name} | (
            {"port": self.world.ports[name]} if name in self.world.ports else {}
        )
        query = {"wait": 0} if self.rng.random() < 0.3 else {}
        if order in {"stop", "delete"} and self.rng.random() < 0.2:
            query["force"] = "true"
        self.world.trace(f"{order} {name} {query or ''}")
        try:
            if order == "delete":
                answer = self.http.delete(f"/api/servers/{name}", params=query)
            else:
                path = "" if order == "create" else f"/{name}/{order}"
                answer = self.http.post(
                    f"/api/servers{path}", params=query, json=body if order == "create" else {}
                )
        except httpx.ConnectError:
            time.sleep(0.1)
            return False
        except httpx.TransportError as error:
            self.world.trace(f"{order} {name}: {error!r}")
            return None
        self.world.trace(
            f"{order} {name}: {answer.status_code}"
            f" {answer.text[:300] if answer.status_code >= 400 else ''}"
        )
        return answer

    def update_expectation(self, order, name, expectation, answer):
        status = answer.status_code
        ended = status == 200 and order in {"stop", "delete"}
        if ended and self.expectations:
            self.must_be_gone(order, name)
        if status in SUCCESS:
            # A server can be stopped while it is being deleted: a stop does not prove existence.
            expectation.exists = {"delete": False, "stop": expectation.exists}.get(order, True)
            expectation.up = order not in {"stop", "delete"}
            state = answer.json()["state"]
            wanted = (
                {"stopped"} if ended else {"running"} if status != 202 and expectation.up else None
            )
            if wanted and state not in wanted:
                self.world.record_violation(
                    f"{order} {name} returned {status}, but its state is {state}"
                )
        elif status == 404:
            if expectation.exists and self.expectations:
                self.world.record_violation(f"{order} {name}: the server is lost")
            expectation.exists = False
        elif status == 502 and order not in {"stop", "delete"}:
            # The server was killed during its start; `false_states` checks its failure.
            expectation.exists, expectation.up = True, True
        elif status in OUT_OF_SPACE and self.world.may_refuse():
            expectation.exists = expectation.up = None
        elif status == 409:
            # The server is being deleted, or a later request of another caller overrode this one.
            if self.expectations and expectation.exists is True:
                self.world.record_violation(f"{order} {name}: {answer.text}")
        else:
            self.world.record_violation(f"{order} {name} returned {status}: {answer.text}")

    def must_be_gone(self, order, name):
        left = [seen for seen in self.world.processes() if seen.name == name and not seen.zombie]
        if left or (self.world.keeper.server_dirs / name).exists():
            self.world.record_violation(
                f"{order} {name} succeeded, but left {left or 'its server directory'}"
            )

    def start_kernel(self, name):
        with contextlib.suppress(httpx.HTTPError, AssertionError, KeyError):
            server = self.http.get(f"/api/servers/{name}").json()
            if server["state"] == "running":
                self.world.trace(f"start a kernel in {name}")
                start_kernel(server)


def _process_info(pid, server_dirs, place):
    """Return information about a process that belongs to the runtime directory `server_dirs`."""
    root = Path(f"/proc/{pid}")
    state, parent = (root / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    command = (root / "cmdline").read_bytes().replace(b"\0", b" ")
    mark = re.search(rb"(?:^|\0)LABKEEPER_SERVER=([^\0]*)", (root / "environ").read_bytes())
    server_dir = mark[1] if mark else b""
    if server_dir.startswith(server_dirs + b"/.forkservers/"):
        return ProcessInfo(
            pid, int(parent), "rehearsal", server_dir.split(b"/")[-2].decode(), state == "Z"
        )
    if server_dir.startswith(server_dirs + b"/"):
        server = command.startswith(b"jupyter-lab") or b" exec " in command
        return ProcessInfo(
            pid,
            int(parent),
            "server" if server else "kernel",
            server_dir.split(b"/")[-1].decode(),
            state == "Z",
        )
    here = str((root / "cwd").readlink()).removesuffix(" (deleted)")
    if server_dir.strip() or not here.startswith(place):
        return None
    spare = command.startswith(b"jupyter-lab")
    return ProcessInfo(
        pid,
        int(parent),
        "spare" if spare else "forkserver",
        here.removeprefix(place).split("/")[0],
        state == "Z",
    )


def _port_outside_ephemeral_range():
    """Return a free port that is not assigned to connections, and so stays free after a kill."""
    return next(
        port
        for port in random.Random(os.getpid() + time.time_ns()).sample(range(15000, 32000), 1000)
        if port_is_free(port)
    )


def _is_zombie(process):
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


def _is_at_rest(server, wholly):
    # The second backoff is longer than a round, so it counts as rest, except at the end.
    return server["state"] in RESTING_STATES or (
        server["state"] == "backoff" and server["restarts"] >= 1 and not wholly
    )


def _unknown_files_in(directory, known):
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name not in known:
                yield f"unexpected file: {path}"


def _resource_counts(pid):
    try:
        return tuple(len(list(Path(f"/proc/{pid}/{what}").iterdir())) for what in ("fd", "task"))
    except OSError:
        return 0, 0


def run_rounds(world):
    """Run all rounds; if one fails, report the trace, the API, processes, files and the log."""
    number = 0
    try:
        world.keeper.start()
        until(
            lambda: any(seen.kind == "spare" for seen in world.processes()),
            what="a fork server to be ready",
        )
        world.prepare()
        for number in range(ROUNDS):
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


@pytest.mark.timeout(max(600, ROUNDS * 60))
@pytest.mark.parametrize("kills", KILL_MIXES, ids=lambda kills: f"{kills}, seed {SEED}")
def test_api_matches_reality_after_kills_under_load(tmp_path, kills):
    run_rounds(World(tmp_path / "keeper", f"{SEED}/{kills}", KILL_MIXES[kills]))


@pytest.mark.root
@pytest.mark.timeout(max(600, ROUNDS * 60))
@pytest.mark.parametrize(
    "shortage_world", [pytest.param(FewPids, marks=needs_group), FewDescriptors, FullDisk]
)
def test_api_matches_reality_after_shortages_under_load(tmp_path, shortage_world):
    world = shortage_world(tmp_path / "keeper", f"{SEED}/{shortage_world.__name__}", SHORTAGE)
    try:
        run_rounds(world)
    finally:
        world.close()

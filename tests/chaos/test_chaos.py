"""Whatever is killed or runs out under load: what the keeper says afterwards is so, and nothing is lost, doubled or left.

A round is some load, some kills in its middle, and a comparison of the world with the API when all is at rest; or it has no room
for processes and threads, for descriptors or on the disk for a while. All chances are drawn from a seed. What they meet depends
on the machine, so the same seed tells the same plan, not always the same story.

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
"""Of each kind."""
MIXES = {
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
"""How likely a round has kills of each kind. In `servers` the keeper lives on, so that what it gathers is seen."""
SHORTAGE = {"shortage": 1.0, "server": 0.4, "kernel": 0.2}
"""Where something runs out in every round. The keeper is not killed: what it could not store would be lost with it."""
LOAD_SECONDS = (0.2, 0.6)
SPELL_SECONDS = (0.3, 1.5)
"""How long something is short."""
AGREES_WITHIN = 30.0
"""Seconds in which a world at rest comes to agree with the API; logs of deleted servers and zombies go a moment later."""
OWNED = (("one", "two"), ("three", "four"), ("five", "fixed"))
"""Names by the caller who alone gives orders about them, and so knows what must be."""
SHARED = "shared"
"""The name that everybody else fights for."""
REST = {"running", "stopped", "failed"}
GOOD = {200, 201, 202}
REFUSED = {502, 503}
"""How an order is answered for which there is no room: it could not be carried out, or not even be noted down."""
STILL = "still"
"""The name that nobody kills, and gives no orders about: what runs under it goes on whatever runs out."""
KILLED = {"killed", "other"}
"""The classes of failure that a kill may lead to; nobody may have seen how a server ended, and then it is `other`."""
MOST_RESTARTS = 3
"""After so many launches that nobody asked for, a server that was ready once is given up."""
OF_STATE = {
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
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@dataclass(frozen=True)
class Seen:
    """A process of this world, as the kernel shows it."""

    pid: int
    parent: int
    kind: str
    """server, kernel (or whatever else a server started), forkserver, spare, rehearsal."""
    name: str
    """Of its server, or of the directory of its fork server."""
    zombie: bool


@dataclass
class Belief:
    """What the only one who gives orders about a name knows of it; None is not knowing."""

    exists: bool | None = False
    up: bool | None = None


class World:
    """A keeper, all that belongs to it, and what callers were told."""

    def __init__(self, base, seed, mix):
        # On a full disk a refusal takes no time, so that all callers together ask more often than one token may by default.
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
        self.beliefs = {name: Belief() for names in OWNED for name in names}
        self.ports = {"fixed": _quiet_port()}
        self.keeper.port = _quiet_port()
        self.story = collections.deque(maxlen=400)
        self.lies = []
        self.sizes = []
        self.begun = time.monotonic()

    def keeper_in(self, base, **settings):
        return KeeperProcess(base, **settings)

    def tell(self, text):
        self.story.append(f"{time.monotonic() - self.begun:8.3f} {text}")

    def lie(self, text):
        self.tell(f"A LIE: {text}")
        self.lies.append(text)

    # What there is

    def processes(self):
        server_dirs = os.fsencode(self.keeper.server_dirs.resolve())
        place = f"{self.keeper.server_dirs.resolve()}/.forkservers/"
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError):
                    seen = _seen(int(entry.name), server_dirs, place)
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

    # What is done to it

    def disturb(self, kind, rng):
        self.kill(kind, rng)

    def kill(self, kind, rng):
        """Kill some of a kind; what there is of it now."""
        if kind == "keeper":
            self.kill_keeper(rng)
            return
        there = sorted(
            {seen.pid for seen in self.processes() if seen.kind == kind and seen.name != STILL}
        )
        chosen = rng.sample(there, rng.randint(1, len(there))) if there else []
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.tell(f"kill -9 {kind} {chosen or '(there is none)'}")

    def kill_keeper(self, rng):
        self.tell(f"kill -9 keeper {self.keeper.process.pid}")
        self.keeper.kill()
        while rng.random() < 0.25:
            # Also while it boots.
            with self.keeper.log.open("ab") as log:
                keeper = subprocess.Popen(
                    self.keeper.command("serve"),
                    env=self.keeper.environment,
                    stdout=log,
                    stderr=log,
                )
            time.sleep(rng.uniform(0.0, 0.8))
            assert keeper.poll() is None, "the keeper would not start"
            keeper.kill()
            keeper.wait()
            self.tell(f"kill -9 keeper {keeper.pid}, which had begun a moment ago")
        time.sleep(rng.uniform(0.0, 0.1))
        self.keeper.start()
        self.tell(f"keeper {self.keeper.process.pid} is ready")

    def begin(self):
        """What is there before the first round."""

    # A round

    def round(self, number):
        rng = random.Random(f"{self.seed}/{number}")
        self.tell(f"round {number}")
        load = rng.uniform(*LOAD_SECONDS)
        plan = [
            (rng.uniform(0.0, load), kind)
            for kind, chance in self.mix.items()
            if rng.random() < chance
        ]
        over = threading.Event()
        names = [*OWNED, (SHARED,), (SHARED,)]
        if not any(seen.kind == "spare" for seen in self.processes()):
            # Without a fork server each start takes a processor for more than a second: fewer orders say as much.
            names = rng.sample(names, 2)
        callers = [
            Caller(self, each, random.Random(f"{self.seed}/{number}/{at}"), over)
            for at, each in enumerate(names)
        ]
        watcher = threading.Thread(target=self.watch, args=(over,))
        begun = time.monotonic()
        for thread in (*callers, watcher):
            thread.start()
        try:
            for moment, kind in sorted(plan):
                time.sleep(max(0.0, begun + moment - time.monotonic()))
                self.disturb(kind, rng)
            time.sleep(max(0.0, begun + load - time.monotonic()))
        finally:
            over.set()
            for thread in (*callers, watcher):
                thread.join()
        self.settle()

    def watch(self, over):
        """Look all the time whether two processes are the server of one name."""
        before = set()
        while not over.wait(0.1):
            by_name = collections.defaultdict(set)
            seen = [each for each in self.processes() if each.kind == "server" and not each.zombie]
            parents = {each.pid: each.parent for each in seen}
            for each in seen:
                # What a server is about to start as a kernel looks as it does for a moment.
                if each.parent not in parents:
                    by_name[each.name].add(each.pid)
            doubles = {(name, *sorted(pids)) for name, pids in by_name.items() if len(pids) > 1}
            for name, *pids in doubles & before:
                self.lie(f"'{name}' has two processes: {pids}")
            before = doubles

    def settle(self, *, wholly=False):
        """Wait until all is at rest, and compare."""

        def at_rest():
            servers = self.servers().values()
            return not [s for s in servers if not _rests(s, wholly)]

        until(at_rest, what="all servers at rest")
        end = time.monotonic() + AGREES_WITHIN
        while differences := [*self.differences()]:
            assert time.monotonic() < end, "\n".join(differences)
            time.sleep(0.05)
        assert not self.lies, self.lies

    # What must be so

    def differences(self):
        servers = self.servers()
        processes = self.processes()
        keeper = self.keeper.process.pid
        forkservers = {seen.pid: seen for seen in processes if seen.kind == "forkserver"}
        for name, server in servers.items():
            yield from self.untrue(server, [seen for seen in processes if seen.name == name])
        running = {name for name, server in servers.items() if server["state"] == "running"}
        for seen in processes:
            if seen.kind in {"server", "kernel"} and seen.name not in running:
                yield f"nobody's process: {seen}"
        yield from self.disbelieved(servers)
        yield from self.unknown_files(servers, forkservers.values())
        yield from (f"a zombie: {pid}" for pid in self.zombies({keeper, *forkservers}))
        yield from self.unwanted_forkservers(processes)
        yield from self.grown(keeper, len(running), forkservers)

    def untrue(self, server, processes):
        name, state, pid = server["name"], server["state"], server["pid"]
        if state == "failed":
            kind, end = server["failure"]["failure_class"], server["failure"]["exit"] or {}
            if not self.may_fail(kind, end):
                yield f"'{name}' failed for a reason that is no kill: {server['failure']}"
            if server["started_at"] is not None and server["restarts"] < MOST_RESTARTS:
                yield f"'{name}' has run, and was given up after {server['restarts']} restarts"
        if state != "running":
            if pid is not None or server["port"] is not None:
                yield f"'{name}' is {state} and has an endpoint"
            if processes:
                yield f"'{name}' is {state} and has processes: {processes}"
        else:
            yield from self.not_as_told(server, processes)

    def may_fail(self, kind, end):
        return kind in KILLED and not (kind == "other" and end.get("code") is not None)

    def may_refuse(self):
        """Whether orders can be answered that there is no room for them."""
        return False

    def not_as_told(self, server, processes):
        name, pid = server["name"], server["pid"]
        own = [seen.pid for seen in processes if seen.kind == "server"]
        if own != [pid]:
            yield f"'{name}' is pid {pid}, and these are there: {processes}"
            return
        if name in self.ports and server["port"] != self.ports[name]:
            yield f"'{name}' has port {server['port']}, and asked for {self.ports[name]}"
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
                yield f"'{name}' answers {answer.status_code}"
        except httpx.HTTPError as error:
            yield f"'{name}' does not answer: {error!r}"
        yield from self.unrecorded(server)

    def unrecorded(self, server):
        server_dir = self.keeper.server_dirs / server["name"]
        try:
            record = json.loads((server_dir / "launch.json").read_text())
        except OSError as error:
            yield f"no record: {error}"
            return
        facts = {
            key: record[key] for key in ("pid", "generation", "launched_by", "exec_reason", "ready")
        }
        told = {key: server[key] for key in ("pid", "generation", "launched_by", "exec_reason")} | {
            "ready": True
        }
        if facts != told:
            yield f"recorded is {facts}, told is {told}"
        if (record["forkserver"] is None) != (server["launched_by"] == "exec"):
            yield f"'{server['name']}' was launched by {server['launched_by']}, and its fork server is {record['forkserver']}"
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
            yield f"in the room of '{server['name']}' is {left}"

    def disbelieved(self, servers):
        """What does not fit what callers were told."""
        for name, belief in self.beliefs.items():
            server = servers.get(name)
            if belief.exists is not None and belief.exists != (server is not None):
                yield f"'{name}' {'is lost' if belief.exists else 'was deleted, and is there'}"
            elif (
                server is not None
                and belief.up is not None
                and (server["goal"] == "up") != belief.up
            ):
                yield f"'{name}' should be {'up' if belief.up else 'down'}, and its goal is {server['goal']}"
        for name, server in servers.items():
            up = server["state"] in {"running", "backoff", "failed"}
            if (server["goal"] == "up") != up:
                yield f"'{name}' is {server['state']}, and its goal is {server['goal']}"
            log = self.keeper.state_dir / "logs" / f"{name}.log"
            launches = re.findall(
                r"^\[labkeeper\] launch (\d+) of",
                log.read_text() if log.exists() else "",
                re.MULTILINE,
            )
            if len(launches) != len(set(launches)):
                yield f"'{name}' was launched twice under one number: {launches}"

    def unknown_files(self, servers, forkservers):
        state, server_dirs = self.keeper.state_dir, self.keeper.server_dirs
        logs = {f"{name}.log" for name in (*servers, "_forkserver")}
        running = {name for name, server in servers.items() if server["state"] == "running"}
        places = {seen.name for seen in forkservers}
        yield from _left(state, OF_STATE)
        yield from _left(state / "logs", logs | {f"{log}.1" for log in logs})
        yield from _left(server_dirs, running | {".forkservers", "keeper.lock"})
        yield from _left(server_dirs / ".forkservers", places)
        yield from _left(self.keeper.notebook_dir, set())
        for place in places:
            yield from _left(
                server_dirs / ".forkservers" / place, {"socket", "rehearsal.json", "rehearsal"}
            )

    def unwanted_forkservers(self, processes):
        forkservers = [seen for seen in processes if seen.kind == "forkserver"]
        parents = {seen.parent for seen in processes if seen.kind == "server"}
        idle = [seen for seen in forkservers if seen.pid not in parents]
        if len(idle) > 1:
            yield f"more than one fork server without servers: {idle}"
        serving = {seen.pid for seen in forkservers}
        for seen in processes:
            if seen.kind in {"spare", "rehearsal"} and seen.parent not in serving:
                yield f"its fork server is gone: {seen}"

    def grown(self, keeper, running, forkservers):
        """What has grown beyond all that can be in use: it would grow for ever."""
        files, threads = _size(keeper)
        self.sizes.append((running, files, threads, *(_size(pid)[0] for pid in forkservers)))
        if files > 60 + 6 * running or threads > 60 + 3 * running:
            yield f"the keeper has {files} files and {threads} threads for {running} servers"
        for pid in forkservers:
            if _size(pid)[0] > 30 + 2 * running:
                yield f"fork server {pid} has {_size(pid)[0]} files for {running} servers at most"

    # When it fails

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
                f"servers, files and threads of the keeper, files of fork servers: {self.sizes[-1:]}",
                "--- what happened",
                *self.story,
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


class PoorWorld(World):
    """One in which something runs out, in every round."""

    def __init__(self, base, seed, mix):
        super().__init__(base, seed, mix)
        self.still = None
        """The server that goes on, as it was told when it began."""

    def begin(self):
        self.still = self.keeper.post(name=STILL).json()
        start_kernel(self.still)

    def disturb(self, kind, rng):
        if kind != "shortage":
            super().disturb(kind, rng)
            return
        spare, seconds = rng.randint(0, 4), rng.uniform(*SPELL_SECONDS)
        self.tell(f"{seconds:.1f} s of shortage, but for {spare}")
        self.take(spare)
        time.sleep(seconds)
        self.give_back()
        self.tell("no shortage any more")

    def take(self, spare):
        """Let something run out, but for so much of it."""
        raise NotImplementedError

    def give_back(self):
        raise NotImplementedError

    def settle(self, *, wholly=False):
        assert self.keeper.process.poll() is None, "the keeper has ended"
        super().settle(wholly=wholly)
        until(
            lambda: self.keeper.http.get("/readyz").status_code == 200,
            what="the keeper is ready again",
        )
        # Whatever failed for want of room starts now that there is some.
        for name, server in self.servers().items():
            if server["state"] == "failed":
                answer = self.keeper.post(f"/{name}/start")
                assert answer.status_code in GOOD, (
                    f"start {name}: {answer.status_code} {answer.text}"
                )
                if name in self.beliefs:
                    self.beliefs[name].up = True

    def differences(self):
        yield from super().differences()
        still = self.servers()[STILL]
        if (still["pid"], still["generation"]) != (self.still["pid"], self.still["generation"]):
            yield f"'{STILL}' answered all the time, and was ended: {still}"

    def may_fail(self, kind, end):
        return True

    def may_refuse(self):
        return True

    def close(self):
        """Remove what it was made with."""


class FewPids(PoorWorld):
    """There is no room for processes and threads, of the keeper and all its servers together."""

    def keeper_in(self, base, **settings):
        self.group = Group()
        return GroupedKeeper(base, self.group, **settings)

    def take(self, spare):
        self.group.allow(self.group.count + spare)

    def give_back(self):
        self.group.allow("max")

    def close(self):
        self.group.remove()


class FewDescriptors(PoorWorld):
    """The keeper can open no more files and connections."""

    def take(self, spare):
        pid = self.keeper.process.pid
        highest = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
        self.before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1 + spare, self.before[1]))

    def give_back(self):
        resource.prlimit(self.keeper.process.pid, resource.RLIMIT_NOFILE, self.before)


class FullDisk(PoorWorld):
    """There is no room where the keeper, its servers and their logs write."""

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
    """Gives orders about some names, and notes what it was told."""

    def __init__(self, world, names, rng, over):
        super().__init__()
        self.world = world
        self.names = names
        self.rng = rng
        self.over = over
        self.beliefs = world.beliefs if names[0] in world.beliefs else None

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
                except Exception as error:  # noqa: BLE001 - it has to be told in the test's own thread
                    self.world.lie(f"a caller fell over {error!r}")
                time.sleep(self.rng.uniform(0.0, 0.05))

    def step(self):
        name = self.rng.choice(self.names)
        belief = self.beliefs[name] if self.beliefs else Belief(exists=None)
        if belief.exists is False:
            order = "create"
        else:
            order = self.rng.choice(["create", "start", "restart", "stop", "delete", "kernel"])
        if order == "kernel":
            self.start_kernel(name)
            return
        answer = self.send(order, name)
        if answer is None:
            # It may have been heard all the same.
            if belief.exists is not True or order == "delete":
                belief.exists = None
            belief.up = None
        elif answer is not False:
            self.take_in(order, name, belief, answer)

    def send(self, order, name):
        """Give an order; None where nobody knows what came of it, False where nobody heard it."""
        body = {"name": name} | (
            {"port": self.world.ports[name]} if name in self.world.ports else {}
        )
        query = {"wait": 0} if self.rng.random() < 0.3 else {}
        if order in {"stop", "delete"} and self.rng.random() < 0.2:
            query["force"] = "true"
        self.world.tell(f"{order} {name} {query or ''}")
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
            self.world.tell(f"{order} {name}: {error!r}")
            return None
        self.world.tell(
            f"{order} {name}: {answer.status_code} {answer.text[:300] if answer.status_code >= 400 else ''}"
        )
        return answer

    def take_in(self, order, name, belief, answer):
        status = answer.status_code
        ended = status == 200 and order in {"stop", "delete"}
        if ended and self.beliefs:
            self.must_be_gone(order, name)
        if status in GOOD:
            # What is being deleted can be stopped, too: that says nothing of whether it stays.
            belief.exists = {"delete": False, "stop": belief.exists}.get(order, True)
            belief.up = order not in {"stop", "delete"}
            state = answer.json()["state"]
            wanted = {"stopped"} if ended else {"running"} if status != 202 and belief.up else None
            if wanted and state not in wanted:
                self.world.lie(f"{order} {name} was answered {status}, and it is {state}")
        elif status == 404:
            if belief.exists and self.beliefs:
                self.world.lie(f"{order} {name}: it is lost")
            belief.exists = False
        elif status == 502 and order not in {"stop", "delete"}:
            # It was killed while it started, which `untrue` looks at.
            belief.exists, belief.up = True, True
        elif status in REFUSED and self.world.may_refuse():
            belief.exists = belief.up = None
        elif status == 409:
            # Being deleted, or somebody else's order was the last.
            if self.beliefs and belief.exists is True:
                self.world.lie(f"{order} {name}: {answer.text}")
        else:
            self.world.lie(f"{order} {name} was answered {status}: {answer.text}")

    def must_be_gone(self, order, name):
        left = [seen for seen in self.world.processes() if seen.name == name and not seen.zombie]
        if left or (self.world.keeper.server_dirs / name).exists():
            self.world.lie(f"{order} {name} was answered, and there is {left or 'its server_dir'}")

    def start_kernel(self, name):
        with contextlib.suppress(httpx.HTTPError, AssertionError, KeyError):
            server = self.http.get(f"/api/servers/{name}").json()
            if server["state"] == "running":
                self.world.tell(f"a kernel in {name}")
                start_kernel(server)


def _seen(pid, server_dirs, place):
    """Say who a process is, if it belongs to the runtime directory `server_dirs`."""
    root = Path(f"/proc/{pid}")
    state, parent = (root / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    command = (root / "cmdline").read_bytes().replace(b"\0", b" ")
    mark = re.search(rb"(?:^|\0)LABKEEPER_SERVER=([^\0]*)", (root / "environ").read_bytes())
    server_dir = mark[1] if mark else b""
    if server_dir.startswith(server_dirs + b"/.forkservers/"):
        return Seen(
            pid, int(parent), "rehearsal", server_dir.split(b"/")[-2].decode(), state == "Z"
        )
    if server_dir.startswith(server_dirs + b"/"):
        server = command.startswith(b"jupyter-lab") or b" exec " in command
        return Seen(
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
    return Seen(
        pid,
        int(parent),
        "spare" if spare else "forkserver",
        here.removeprefix(place).split("/")[0],
        state == "Z",
    )


def _quiet_port():
    """Find a free port that no connection of anybody is given by chance, so that it is free again when its owner is killed."""
    return next(
        port
        for port in random.Random(os.getpid() + time.time_ns()).sample(range(15000, 32000), 1000)
        if port_is_free(port)
    )


def _is_zombie(process):
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


def _rests(server, wholly):
    # The second wait after a crash is longer than a round: that is at rest, too, until the end.
    return server["state"] in REST or (
        server["state"] == "backoff" and server["restarts"] >= 1 and not wholly
    )


def _left(directory, known):
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name not in known:
                yield f"nobody's file: {path}"


def _size(pid):
    try:
        return tuple(len(list(Path(f"/proc/{pid}/{what}").iterdir())) for what in ("fd", "task"))
    except OSError:
        return 0, 0


def survive(world):
    """Go through the rounds, and tell the whole story when something is not as it must be."""
    number = 0
    try:
        world.keeper.start()
        until(
            lambda: any(seen.kind == "spare" for seen in world.processes()),
            what="a fork server is ready",
        )
        world.begin()
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
@pytest.mark.parametrize("kills", MIXES, ids=lambda kills: f"{kills}, seed {SEED}")
def test_whatever_is_killed_under_load_the_api_tells_what_is_so(tmp_path, kills):
    survive(World(tmp_path / "keeper", f"{SEED}/{kills}", MIXES[kills]))


@pytest.mark.root
@pytest.mark.timeout(max(600, ROUNDS * 60))
@pytest.mark.parametrize(
    "poor", [pytest.param(FewPids, marks=needs_group), FewDescriptors, FullDisk]
)
def test_whatever_runs_out_under_load_the_api_tells_what_is_so(tmp_path, poor):
    world = poor(tmp_path / "keeper", f"{SEED}/{poor.__name__}", SHORTAGE)
    try:
        survive(world)
    finally:
        world.close()

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
import random
import resource
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from chaos_world import ROUNDS, SEED, World, port_outside_ephemeral_range, run_rounds
from harness import PATIENCE, start_kernel, until
from shortages import Disk, Group, GroupedKeeper, needs_group

KILL_MIXES = {
    "everything": {
        "keeper": 0.35,
        "forkserver": 0.06,
        "spare": 0.2,
        "server": 0.6,
        "kernel": 0.3,
        "zygote": 0.3,
        "loader": 0.1,
        "rehearsal": 0.1,
    },
    "keepers": {"keeper": 1.0, "server": 0.3, "kernel": 0.1},
    "servers": {"server": 1.0, "kernel": 0.5, "spare": 0.3, "forkserver": 0.03},
    "forkservers": {
        "forkserver": 0.16,
        "spare": 0.5,
        "loader": 0.3,
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
EXCLUSIVE_NAMES = (("one", "two"), ("three", "four"), ("five", "fixed"))
"""Names by caller: each caller has exclusive use of its names, and knows their expected state."""
SHARED_NAME = "shared"
"""The name that all other callers compete for."""
SUCCESS = {200, 201, 202}
OUT_OF_SPACE = {502, 503}
"""Status codes of requests that fail for lack of resources, before or after they were recorded."""
UNDISTURBED = "still"
"""The name that is neither killed nor requested, and must keep running through any shortage."""

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@dataclass
class Expectation:
    """What the exclusive caller of a name knows about it; None means unknown."""

    exists: bool | None = False
    up: bool | None = None


class CalledWorld(World):
    """A world with callers, and what they expect of it."""

    def __init__(self, base, seed, mix):
        super().__init__(base, seed)
        self.mix = mix
        self.expectations = {name: Expectation() for names in EXCLUSIVE_NAMES for name in names}
        self.ports["fixed"] = port_outside_ephemeral_range()

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
            self.kill_process(kind, pid)
        self.trace(f"kill -9 {kind} {chosen or '(none found)'}")

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

    # Comparison

    def differences(self):
        yield from super().differences()
        yield from self.unmet_expectations(self.servers())

    def may_refuse(self):
        """Return whether requests may be refused for lack of resources."""
        return False

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


class ShortageWorld(CalledWorld):
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


@pytest.mark.timeout(max(600, ROUNDS * 60))
@pytest.mark.parametrize("kills", KILL_MIXES, ids=lambda kills: f"{kills}, seed {SEED}")
def test_api_matches_reality_after_kills_under_load(tmp_path, kills):
    run_rounds(CalledWorld(tmp_path / "keeper", f"{SEED}/{kills}", KILL_MIXES[kills]))


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

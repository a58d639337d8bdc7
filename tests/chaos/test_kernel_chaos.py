"""Kill what forks kernels, in every order: kernels of a living server go on, others end.

Each round kills one process of each kind, in another order, while kernels run cells and users start
further ones. Then the kernels of each server are asked for what they knew before. A seed determines
orders and victims.

    SEED=7 CHAOS_ROUNDS=720 pytest tests/chaos/test_kernel_chaos.py
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest

from chaos_world import SEED, World, run_rounds
from harness import PATIENCE, alive, forked, processes_marked, until
from kernel import Kernel, call_server
from kernel_processes import ForkingKeeper

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "5"))
"""Number of rounds; 720 have each order once."""
KINDS = ("zygote", "server", "forkserver", "loader", "keeper", "kernel")
NAMES = ("one", "two", "three")
KERNELS = 2
"""Kernels of each server whose state is checked."""
GAP_SECONDS = (0.0, 0.3)
"""Between two kills."""
REASONS = (
    "the zygote has ended",
    "the zygote cannot be reached",
    "ipykernel is still being loaded",
    "no kernel loader runs",
    "the server itself was executed",
)
"""Beginnings of the reasons for which a kernel may be executed after kills."""
SAME = ("state", "pid", "generation", "launched_by")
"""Fields of a server that do not change while it lives."""
BUSY = """
import os, time
while not os.path.exists({!r}):
    steps += 1
    time.sleep(0.001)
steps > 0
"""

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux"),
]


@dataclass
class Known:
    """A kernel, and what is known of it."""

    kernel: Kernel
    pid: int
    secret: int
    """The value of its variable `secret`."""
    cell: str = ""
    """The message of the cell that it runs."""


class KernelWorld(World):
    """A world with servers that have busy kernels."""

    def __init__(self, base, seed):
        super().__init__(base, seed)
        self.rng = random.Random(seed)
        orders = list(itertools.permutations(KINDS))
        self.rng.shuffle(orders)
        self.orders = itertools.cycle(orders)
        self.present = {}
        """The answers of the API to the starts of the servers, by name."""
        self.known = {name: [] for name in NAMES}
        self.replaced = set()
        """Names of servers that are replaced before the next round."""
        self.doomed = set()
        """Names of servers that are killed in this round."""
        self.harmed = set()
        """Names of servers whose zygotes are killed in this round."""
        self.lost = set()
        """Processes of killed servers."""
        self.over = base / "over"
        """A file that ends all cells."""

    def keeper_in(self, base, **settings):
        return ForkingKeeper(base, **settings)

    # Rounds

    def round(self, number):
        order = next(self.orders)
        self.trace(f"round {number}: {', '.join(order)}")
        self.lost = set()
        self.over.unlink(missing_ok=True)
        for name in NAMES:
            self.prepare_server(name)
        victims = {
            "server": self.rng.sample(NAMES, self.rng.randint(1, len(NAMES) - 1)),
            "zygote": [self.rng.choice(NAMES)],
            "kernel": [self.rng.choice(NAMES)],
        }
        self.doomed, self.harmed = set(victims["server"]), set(victims["zygote"])
        killed = self.rng.choice(self.known[victims["kernel"][0]])
        over = threading.Event()
        users = [threading.Thread(target=self.use, args=(name, over)) for name in NAMES]
        watcher = threading.Thread(target=self.watch, args=(over,))
        for thread in (*users, watcher):
            thread.start()
        try:
            with ThreadPoolExecutor(1) as beside:
                for kind in order:
                    time.sleep(self.rng.uniform(*GAP_SECONDS))
                    self.kill(kind, victims.get(kind), killed, beside)
        finally:
            over.set()
            for thread in (*users, watcher):
                thread.join()
        assert not self.violations, self.violations
        self.compare(killed)
        self.settle()

    def kill(self, kind, names, killed, beside):
        if kind == "keeper":
            self.trace(f"kill -9 keeper {self.keeper.process.pid}")
            self.killed[kind] += 1
            self.keeper.kill()
            beside.submit(self.restart_keeper, self.rng.uniform(*GAP_SECONDS))
            return
        processes = self.processes()
        if kind == "kernel":
            pids = [killed.pid]
        else:
            pids = [
                seen.pid
                for seen in processes
                if seen.kind == kind and (names is None or seen.name in names)
            ]
        if kind == "server":
            self.lost.update(seen.pid for seen in processes if seen.name in names)
        self.trace(f"kill -9 {kind} {names or ''} {pids or '(none found)'}")
        for pid in pids:
            self.kill_process(kind, pid)

    def restart_keeper(self, delay):
        time.sleep(delay)
        try:
            self.keeper.start()
            self.trace(f"keeper {self.keeper.process.pid} is ready")
        except Exception as error:  # noqa: BLE001 - reported by the test's own thread
            self.record_violation(f"the keeper did not start: {error!r}")

    # Before the kills

    def prepare_server(self, name):
        """Make a server run that can fork, with busy kernels that were forked."""
        if name not in self.present or name in self.replaced:
            self.replace(name)
        for each in list(self.known[name]):
            if self.listed(name)[each.kernel.id] != ("fork", None):
                self.end(name, each.kernel)
                self.known[name].remove(each)
        while len(self.known[name]) < KERNELS:
            kernel = until(lambda: self.forked_kernel(name), what=f"a zygote of {name}")
            known = Known(kernel, kernel.process.pid, self.rng.randrange(10**6))
            assert kernel.execute(f"secret, steps = {known.secret}, 0").status == "ok"
            self.known[name].append(known)
        for each in self.known[name]:
            each.cell = each.kernel.begin(BUSY.format(str(self.over)))
            each.kernel.wait_for_kind("status", each.cell, execution_state="busy")
        pids = [each.pid for each in self.known[name]]
        self.trace(f"{name} is {self.present[name]['pid']}, its kernels are {pids}")

    def replace(self, name):
        """Start another server of this name, which is forked."""
        self.forget(name)
        if name in self.present:
            assert self.keeper.delete(name, force="true").status_code == 200
        self.present[name] = forked(self.keeper, name)

    def forget(self, name):
        for each in self.known[name]:
            each.kernel.close()
        self.known[name] = []

    def forked_kernel(self, name):
        """Start a kernel; end it and return None if it was executed."""
        kernel = Kernel(self.present[name])
        if self.listed(name)[kernel.id] == ("fork", None):
            return kernel
        self.end(name, kernel)
        return None

    def end(self, name, kernel):
        kernel.close()
        call_server(self.present[name], "DELETE", f"kernels/{kernel.id}")

    # Beside the kills

    def use(self, name, over):
        """Start, use and end further kernels; only a killed server may fail."""
        while not over.is_set():
            try:
                kernel = Kernel(self.present[name])
                assert kernel.value("6 * 7") == 42
                self.end(name, kernel)
            except Exception as error:  # noqa: BLE001 - reported by the test's own thread
                if name not in self.doomed:
                    self.record_violation(f"a user of '{name}' failed: {error!r}")
                return

    def watch(self, over):
        """Check that the API never denies a server that lives, or its kernels."""
        known = {"Authorization": f"Bearer {self.keeper.token}"}
        with httpx.Client(
            base_url=self.keeper.url, headers=known, trust_env=False, timeout=PATIENCE
        ) as http:
            while not over.wait(0.05):
                for name in set(NAMES) - self.doomed:
                    # The keeper may be killed at any moment.
                    with contextlib.suppress(httpx.TransportError):
                        self.look_at(http, name)

    def look_at(self, http, name):
        """Check one server; a keeper that has just started may not have found it yet."""
        server, expected = http.get(f"/api/servers/{name}").json(), self.present[name]
        found = (server.get("state"), server.get("pid")) == ("running", expected["pid"])
        searched = server.get("state") in {"lost", "starting"} and server["pid"] is None
        if not (found or searched) or server["generation"] != expected["generation"]:
            self.record_violation(f"'{name}' lives, but the API says {server}")
        answer = http.get(f"/api/servers/{name}/kernels")
        kernels = {each["id"] for each in answer.json().get("kernels", [])}
        known = {each.kernel.id for each in self.known[name]}
        if answer.status_code != 409 and not kernels >= known:
            self.record_violation(f"'{name}' has lost kernels: {answer.text}")

    # After the kills

    def compare(self, killed):
        """Compare what the API and the kernels say with what has been killed."""
        until(lambda: not any(map(alive, self.lost)), what="what killed servers have left to end")
        self.over.touch()
        for name in NAMES:
            if name in self.doomed:
                self.check_successor(name)
            else:
                self.check_survivor(name, killed)
        for name in NAMES:
            self.check_next_kernel(name)
        self.replaced = self.doomed | {name for name in self.harmed if self.rng.random() < 0.5}

    def listed(self, name):
        """Return how each kernel was launched, which the keeper and the server must agree on."""
        answer = self.keeper.http.get(f"/api/servers/{name}/kernels").raise_for_status()
        told = {each["id"]: _launch(each) for each in answer.json()["kernels"]}
        models = call_server(self.present[name], "GET", "kernels")
        assert told == {each["id"]: _launch(each) for each in models}
        return told

    def check_successor(self, name):
        """The next launch of a killed server has none of the kernels of the last one."""
        generation = self.present[name]["generation"]
        until(
            lambda: self.keeper.get(name)["generation"] > generation,
            what=f"the next launch of '{name}'",
        )
        self.present[name] = self.keeper.wait_for("running", name)
        self.forget(name)
        assert self.listed(name) == {}
        self.wait_for_kernels(name)

    def check_survivor(self, name, killed):
        """A server that was not killed is the same, and its kernels know what they knew."""
        server = self.keeper.get(name)
        assert all(server[field] == self.present[name][field] for field in SAME), server
        for each in self.known[name]:
            if each is killed:
                self.check_restarted(each)
            else:
                assert each.kernel.finish(each.cell).result == "True"
                assert each.kernel.value("__import__('os').getpid(), secret") == (
                    each.pid,
                    each.secret,
                )
        listed = self.listed(name)
        assert listed.keys() == {each.kernel.id for each in self.known[name]}
        for each in self.known[name]:
            launch = listed[each.kernel.id]
            assert launch == ("fork", None) or (
                each is killed and self.may_be_executed(name, launch)
            )
        self.wait_for_kernels(name)
        if killed in self.known[name]:
            self.known[name].remove(killed)
            self.end(name, killed.kernel)

    def check_restarted(self, known):
        """A killed kernel is restarted, without its variables."""
        known.kernel.wait_until_responsive()
        pid, remembers = known.kernel.value("__import__('os').getpid(), 'secret' in globals()")
        assert pid != known.pid
        assert not remembers
        assert not alive(known.pid)
        known.pid = pid

    def check_next_kernel(self, name):
        kernel = Kernel(self.present[name])
        launch = self.listed(name)[kernel.id]
        self.trace(f"the next kernel of '{name}': {launch}")
        assert launch == ("fork", None) or self.may_be_executed(name, launch), launch
        assert kernel.value("6 * 7") == 42
        self.end(name, kernel)

    def may_be_executed(self, name, launch):
        """Return whether the kills are the reason why a kernel was executed."""
        launched_by, reason = launch
        return (
            launched_by == "exec"
            and name in self.doomed | self.harmed
            and reason.startswith(REASONS)
        )

    def wait_for_kernels(self, name):
        """Wait until a server has no processes of other kernels than it should."""
        pids = {each.pid for each in self.known[name]}

        def others():
            return {
                seen.pid for seen in self.processes() if (seen.kind, seen.name) == ("kernel", name)
            } ^ pids

        until(lambda: not others(), what=lambda: f"the right kernels of '{name}': {others()}")

    def settle(self, *, wholly=False):
        super().settle(wholly=wholly)
        if wholly:
            self.end_all()

    def end_all(self):
        """End the servers and the keeper; nothing of them may be left."""
        for name in NAMES:
            self.forget(name)
            assert self.keeper.delete(name).status_code == 200
        assert not processes_marked(self.keeper.server_dirs, rehearsals=False)
        assert self.keeper.stop() == 0
        assert not processes_marked(self.keeper.server_dirs)
        assert not self.keeper.left_of_fork_servers()
        assert not self.keeper.in_server_dirs()
        assert not self.keeper.control_groups()


def _launch(kernel):
    return kernel["launched_by"], kernel["exec_reason"]


@pytest.mark.timeout(max(600, ROUNDS * 60))
@pytest.mark.parametrize("seed", [SEED])
def test_kernels_of_living_servers_survive_all_other_kills_and_others_end(tmp_path, seed):
    run_rounds(KernelWorld(tmp_path / "keeper", f"{seed}/kernels"), ROUNDS)

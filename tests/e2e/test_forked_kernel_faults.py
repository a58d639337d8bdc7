"""Forked kernels go on when what has forked them dies, and end with their server."""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from harness import (
    alive,
    execute,
    forked,
    kernel_websocket,
    parent_of,
    run_cell,
    start_kernel,
    until,
)
from kernel_processes import (
    SPARE,
    ForkingKeeper,
    ask,
    connection_file,
    delete_servers,
    find_loader,
    fork_kernel,
    kernel_processes,
    launched,
    pid_of,
    processes_of,
    ready_to_fork,
    titled,
    wait_for_end_of,
    zygote_of,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")


@pytest.fixture(scope="module")
def _started(tmp_path_factory):
    keeper = ForkingKeeper(tmp_path_factory.mktemp("kernel-faults") / "keeper")
    try:
        yield keeper.start_to_fork()
    finally:
        keeper.close()


@pytest.fixture
def keeper(_started):
    yield _started
    delete_servers(_started)


@pytest.fixture
def make_keeper(tmp_path):
    """Create a keeper that a test may harm."""
    made = []

    def make():
        made.append(ForkingKeeper(tmp_path / f"keeper{len(made)}"))
        return made[-1].start_to_fork()

    yield make
    for each in made:
        each.close()


def interrupt(keeper, server, kernel):
    """Interrupt a cell that never ends by itself."""
    running = keeper.notebook_dir / "running"
    with ThreadPoolExecutor() as beside:
        endless = beside.submit(
            run_cell, server, kernel, f"open({str(running)!r}, 'w').close()\nwhile True: pass"
        )
        until(running.exists, what="the cell to run")
        ask(server, "POST", f"kernels/{kernel}/interrupt")
        assert "KeyboardInterrupt" in str(endless.exception())
    running.unlink()
    # After an error a kernel aborts what was sent meanwhile, without a result.
    until(lambda: run_cell(server, kernel, "1 + 1") == "2", what="the kernel to run cells again")


# Zygotes


def test_kernels_survive_their_killed_zygote_and_the_next_one_is_executed(keeper):
    server = ready_to_fork(keeper)
    zygote = zygote_of(server)
    kernels = [fork_kernel(server) for _ in range(2)]
    for number, (kernel, _) in enumerate(kernels):
        run_cell(server, kernel, f"x = {number}")
    zygote.kill()
    wait_for_end_of(zygote.pid)
    assert [run_cell(server, kernel, "x") for kernel, _ in kernels] == ["0", "1"]
    assert [pid_of(server, kernel) for kernel, _ in kernels] == [pid for _, pid in kernels]
    (first, first_pid), (second, second_pid) = kernels
    interrupt(keeper, server, first)
    assert run_cell(server, first, "x") == "0"

    ask(server, "POST", f"kernels/{first}/restart")
    wait_for_end_of(first_pid)
    assert launched(server, first) == ("exec", "the zygote has ended")
    assert run_cell(server, first, "'x' in globals()") == "False"
    ask(server, "DELETE", f"kernels/{second}")
    wait_for_end_of(second_pid)
    third = start_kernel(server)
    assert launched(server, third)[0] == "exec"
    # Besides these, there may be a zygote that the server loads.
    assert processes_of(keeper) >= {server["pid"], pid_of(server, first), pid_of(server, third)}


def test_kernel_is_executed_if_the_zygote_is_suspended_and_no_second_one_appears(keeper):
    server = ready_to_fork(keeper)
    zygote = zygote_of(server)
    kernel, kernel_pid = fork_kernel(server)
    zygote.suspend()
    executed = start_kernel(server)
    assert launched(server, executed) == ("exec", "the zygote did not answer")
    # It is not asked again.
    later = start_kernel(server)
    assert launched(server, later)[0] == "exec"
    assert pid_of(server, kernel) == kernel_pid
    ask(server, "DELETE", f"kernels/{kernel}")
    until(lambda: not alive(kernel_pid), what="the kernel to end")
    remaining = {server["pid"], pid_of(server, executed), pid_of(server, later)}
    assert processes_of(keeper) >= remaining | {zygote.pid}

    # It forks what it was asked for, which has nothing to do, and ends after it.
    zygote.resume()
    wait_for_end_of(zygote.pid, kernel_pid)
    assert processes_of(keeper) >= remaining
    assert kernel_processes(keeper) <= remaining


def test_server_with_a_suspended_zygote_leaves_nothing_when_it_is_deleted(keeper):
    server = ready_to_fork(keeper)
    zygote = zygote_of(server)
    _, kernel_pid = fork_kernel(server)
    zygote.suspend()
    assert keeper.delete().status_code == 200
    wait_for_end_of(server["pid"], kernel_pid, zygote.pid)
    assert not processes_of(keeper)


# The loader


def another_loader(keeper, server):
    """Start servers until there is a loader again: each may start one, but not soon after one."""

    def look():
        forked(keeper, "needs-one")
        assert keeper.delete("needs-one").status_code == 200
        return find_loader(server)

    return until(look, what="another loader")


def test_servers_survive_their_killed_loader_and_later_ones_fork_kernels_again(keeper):
    server = ready_to_fork(keeper)
    kernel, kernel_pid = fork_kernel(server)
    run_cell(server, kernel, "x = 42")
    killed = find_loader(server)
    killed.kill()
    wait_for_end_of(killed.pid)
    assert (run_cell(server, kernel, "x"), pid_of(server, kernel)) == ("42", kernel_pid)
    # Its zygote lives on.
    _, second_pid = fork_kernel(server)
    second = another_loader(keeper, server)
    second.kill()
    wait_for_end_of(second.pid)
    reasons = [launched(each, start_kernel(each))[1] for each in (forked(keeper, n) for n in "ab")]
    # The second one may have been ready, or the third one may be: nothing keeps them.
    assert set(reasons) <= {
        "the zygote has ended",
        "no kernel loader runs",
        "ipykernel is still being loaded",
        None,
    }
    third = another_loader(keeper, server)
    last = ready_to_fork(keeper, "last")
    assert zygote_of(last).ppid() == third.pid
    fork_kernel(last)
    assert parent_of(last) == parent_of(server)
    assert keeper.delete().status_code == 200
    wait_for_end_of(kernel_pid, second_pid)


def test_servers_start_while_the_loader_is_suspended(keeper):
    """The fork server does not wait for it."""
    first = ready_to_fork(keeper, "first")
    loader = find_loader(first)
    loader.suspend()
    try:
        servers = [keeper.post(name=f"s{number}").json() for number in range(3)]
        assert [(one["state"], one["launched_by"]) for one in servers] == [("running", "fork")] * 3
        assert {parent_of(one) for one in servers} == {parent_of(first)}
        # Its zygote has been forked before.
        assert launched(first, start_kernel(first)) == ("fork", None)
        kernel = start_kernel(servers[2])
        assert launched(servers[2], kernel) == ("exec", "ipykernel is still being loaded")
        assert run_cell(servers[2], kernel, "6 * 7") == "42"
    finally:
        loader.resume()
    for server in servers:
        zygote_of(server)
        fork_kernel(server)


# The fork server and the keeper


def test_kernels_survive_a_killed_fork_server_and_end_with_their_server(make_keeper):
    keeper = make_keeper()
    server = ready_to_fork(keeper)
    kernel, kernel_pid = fork_kernel(server)
    run_cell(server, kernel, "x = 42")
    killed = psutil.Process(parent_of(server))
    loader, zygote = find_loader(server), zygote_of(server)
    others = {process.pid for process in killed.children(recursive=True)}
    others -= {server["pid"], zygote.pid, kernel_pid}
    assert loader.pid in others
    killed.kill()
    # The loader, the spare and its zygote have no more purpose.
    wait_for_end_of(killed.pid, *others)
    assert (run_cell(server, kernel, "x"), pid_of(server, kernel)) == ("42", kernel_pid)
    _, second_pid = fork_kernel(server)
    assert keeper.delete().json()["stop_report"]["method"] == "shutdown"
    wait_for_end_of(server["pid"], kernel_pid, second_pid, zygote.pid)


def test_next_keeper_lists_forked_kernels_and_a_lost_server_ends_its_own(make_keeper):
    keeper = make_keeper()
    lives, dies = (ready_to_fork(keeper, name) for name in ("lives", "dies"))
    kernel, kernel_pid = fork_kernel(lives)
    run_cell(lives, kernel, "x = 42")
    orphans = [fork_kernel(dies)[1] for _ in range(2)] + [zygote_of(dies).pid]
    keeper.kill()
    # Without a keeper, each kernel and the zygote must notice by themselves.
    os.kill(dies["pid"], signal.SIGKILL)
    wait_for_end_of(dies["pid"], *orphans)
    keeper.start()

    keeper.wait_for("running", "lives")
    assert keeper.get("lives")["pid"] == lives["pid"]
    listed = keeper.http.get("/api/servers/lives/kernels").json()["kernels"]
    assert [(one["id"], one["launched_by"], one["exec_reason"]) for one in listed] == [
        (kernel, "fork", None)
    ]
    assert (run_cell(lives, kernel, "x"), pid_of(lives, kernel)) == ("42", kernel_pid)
    fork_kernel(lives)

    # An orderly end leaves nothing of it.
    everything = psutil.Process(parent_of(lives)).children(recursive=True)
    assert {kernel_pid, zygote_of(lives).pid, find_loader(lives).pid} < {
        process.pid for process in everything
    }
    assert keeper.stop() == 0
    assert not [process.pid for process in everything if alive(process.pid)]


# Servers


def test_killed_server_leaves_no_kernel_and_no_zygote(keeper):
    server = ready_to_fork(keeper)
    kernels = [fork_kernel(server)[1] for _ in range(2)]
    zygote = zygote_of(server)
    os.kill(server["pid"], signal.SIGKILL)
    wait_for_end_of(server["pid"], zygote.pid, *kernels)
    until(lambda: keeper.get()["generation"] > server["generation"], what="the next launch")
    again = keeper.wait_for("running")
    # It is forked a moment after its server is ready.
    next_zygote = zygote_of(again)
    assert processes_of(keeper) == {again["pid"], next_zygote.pid}
    assert ask(again, "GET", "kernels") == []


def test_deleted_kernel_and_deleted_server_leave_nothing(keeper):
    server = ready_to_fork(keeper)
    zygote = zygote_of(server)
    (first, first_pid), (second, second_pid) = fork_kernel(server), fork_kernel(server)
    assert connection_file(keeper, server, first).exists()
    ask(server, "DELETE", f"kernels/{first}")
    wait_for_end_of(first_pid)
    assert not connection_file(keeper, server, first).exists()
    assert connection_file(keeper, server, second).exists()
    assert processes_of(keeper) == {server["pid"], zygote.pid, second_pid}
    report = keeper.delete().json()["stop_report"]
    assert (report["method"], report["kernels_stopped"]) == ("shutdown", [second])
    assert not [pid for pid in (server["pid"], zygote.pid, second_pid) if alive(pid)]
    assert not (keeper.server_dirs / "default").exists()


def test_spare_has_no_zygote_and_may_end(keeper):
    server = ready_to_fork(keeper)
    loader = find_loader(server)
    (spare,) = until(
        lambda: [
            process
            for process in psutil.Process(parent_of(server)).children()
            if titled(process, SPARE)
        ],
        what="the spare",
    )
    assert loader.children() == [zygote_of(server)]
    spare.kill()
    wait_for_end_of(spare.pid)
    following = ready_to_fork(keeper, "next")
    fork_kernel(following)
    assert set(loader.children()) == {zygote_of(server), zygote_of(following)}


# Kernels


def wait_for_state(socket_, state):
    """Read a kernel's websocket until the server reports a state of the kernel."""
    while True:
        message = json.loads(socket_.recv())
        if (
            message["header"]["msg_type"] == "status"
            and message["content"]["execution_state"] == state
        ):
            return


@pytest.mark.parametrize("kernels_by", ["fork", "exec"])
def test_killed_kernel_is_restarted_without_being_polled(keeper, kernels_by):
    server = forked(keeper, kernels_by=kernels_by)
    if kernels_by == "fork":
        zygote_of(server)
    kernel = start_kernel(server)
    pid = pid_of(server, kernel)
    with kernel_websocket(server, kernel) as socket_:
        assert execute(socket_, "x = 42; x") == "42"
        os.kill(pid, signal.SIGKILL)
        wait_for_state(socket_, "restarting")
    wait_for_end_of(pid)
    assert run_cell(server, kernel, "'x' in globals()") == "False"
    assert pid_of(server, kernel) != pid
    assert launched(server, kernel)[0] == kernels_by


@pytest.mark.parametrize("kernels_by", ["fork", "exec"])
def test_kernel_that_ends_at_each_start_is_given_up_as_dead(keeper, tmp_path, kernels_by):
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    starts = tmp_path / "starts"
    (startup / "end.py").write_text(
        "import os, sys\n"
        f"with open({str(starts)!r}, 'a') as starts:\n"
        "    starts.write(f'{os.getpid()}\\n')\n"
        "os._exit(1)\n"
    )
    variables = {"IPYTHONDIR": str(tmp_path)}
    server = forked(keeper, kernels_by=kernels_by, kernel_env=variables)
    zygote = zygote_of(server) if kernels_by == "fork" else None
    kernel = start_kernel(server)
    assert launched(server, kernel)[0] == kernels_by
    # Jupyter starts it anew five times, and then forgets it.
    until(lambda: ask(server, "GET", "kernels") == [], what="the kernel to be given up")
    pids = [int(line) for line in starts.read_text().splitlines()]
    assert len(set(pids)) == 6
    wait_for_end_of(*pids)
    assert processes_of(keeper) == {server["pid"]} | ({zygote.pid} if zygote else set())
    (startup / "end.py").unlink()
    kernel = start_kernel(server)
    assert launched(server, kernel)[0] == kernels_by
    assert run_cell(server, kernel, "6 * 7") == "42"

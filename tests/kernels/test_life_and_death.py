"""Restarts, shutdowns, crashes, and the end of the server."""

from __future__ import annotations

import signal

import psutil
import pytest

from harness import alive, until
from kernel import assert_launched_by


def started_processes(kernel):
    """Return two new children of the kernel, which are in its process group."""
    kernel.run(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "shell = subprocess.Popen('exec sleep 1000', shell=True)"
    )
    children = kernel.process.children()
    assert len(children) == 2
    return children


def restart(kernel):
    """Restart a kernel and keep its websocket, though the Lab connects again."""
    kernel.restart(reconnect=False)
    if kernel.model["launched_by"] == "exec":
        # It does not wait until the server's sockets have connected again, and loses its output.
        kernel.wait_until_responsive()


def test_restart_keeps_the_id_and_the_websocket_and_forgets_everything_else(kernel, kernels_by):
    kernel.run("import random, os\nx = 42\nos.environ['ADDED'] = 'yes'\nos.chdir('/')")
    before = kernel.value("(os.getpid(), random.random(), __import__('uuid').uuid4().hex)")
    restart(kernel)
    assert kernel.execute("x").error == "NameError: name 'x' is not defined"
    after = kernel.value(
        "(__import__('os').getpid(), __import__('random').random(), __import__('uuid').uuid4().hex)"
    )
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert not psutil.pid_exists(before[0])
    assert kernel.value("'ADDED' in __import__('os').environ") is False
    assert kernel.value("__import__('os').getcwd()") == kernel.server["root_dir"]
    assert kernel.model["id"] == kernel.id
    assert_launched_by(kernel.model, kernels_by)


def test_no_output_of_the_first_cell_after_a_restart_is_lost(kernel):
    lines = "".join(f"line {number}\n" for number in range(2000))
    for _ in range(2):
        restart(kernel)
        assert kernel.run("for n in range(2000): print('line', n)") == lines


def test_restart_of_a_busy_kernel_ends_its_cell_and_its_children(kernel):
    children = started_processes(kernel)
    process = kernel.process
    cell = kernel.begin("print('begun', flush=True)\nwhile True: pass")
    kernel.wait_for_text(cell, "begun")
    restart(kernel)
    assert kernel.value("6 * 7") == 42
    assert kernel.process != process
    until(lambda: not any(alive(child.pid) for child in children), what="the children to end")


def test_shutdown_runs_exit_hooks_once(kernel, directory):
    ended = directory / "ended"
    kernel.run(
        "import atexit, threading\n"
        "def end(what):\n"
        f"    with open({str(ended)!r}, 'a') as file:\n"
        "        print(what, file=file)\n"
        "atexit.register(end, 'hook')\n"
        "threading._register_atexit(end, 'threads')"
    )
    kernel.shutdown()
    assert ended.read_text() == "threads\nhook\n"


def test_shutdown_leaves_no_process_zombie_or_file(kernel, connection_file):
    children = started_processes(kernel)
    pid = kernel.process.pid
    assert connection_file(kernel).exists()
    kernel.shutdown()
    assert not psutil.pid_exists(pid)
    until(
        lambda: not any(psutil.pid_exists(child.pid) for child in children),
        what="the children to end, and to be reaped",
    )
    assert not connection_file(kernel).exists()


def test_shutdown_of_a_kernel_that_answers_no_request_or_signal_kills_it(
    kernel, connection_file, directory
):
    pid = kernel.process.pid
    begun = directory / "begun"
    kernel.begin(
        "import signal, ctypes\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(begun)!r}, 'w').close()\n"
        "ctypes.PyDLL(None).sleep(1000)"  # Holds the GIL.
    )
    until(begun.exists, what="the cell to begin")
    kernel.shutdown()
    assert not psutil.pid_exists(pid)
    assert not connection_file(kernel).exists()


DEATHS = {
    "os._exit": "import os\nos._exit(3)",
    "SIGKILL": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "a segmentation fault": "import ctypes\nctypes.string_at(0)",
}


@pytest.mark.parametrize("death", DEATHS)
def test_death_of_a_kernel_is_noticed_and_the_next_cell_on_its_websocket_works(
    kernel, kernels_by, death
):
    kernel.run("x = 42")
    pid = kernel.process.pid
    kernel.begin(DEATHS[death])
    kernel.wait_for_status("restarting")
    kernel.wait_until_responsive()
    assert kernel.execute("x").error == "NameError: name 'x' is not defined"
    assert kernel.process.pid != pid
    assert not psutil.pid_exists(pid)
    assert_launched_by(kernel.model, kernels_by)


def test_exit_in_a_cell_ends_the_process(kernel):
    """The Lab then offers a new kernel, or the server starts one."""
    pid = kernel.process.pid
    kernel.begin("exit()")
    kernel.wait_for_status("restarting")
    kernel.wait_until_responsive()
    assert not psutil.pid_exists(pid)
    assert kernel.value("6 * 7") == 42


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_kernels_end_after_a_sigkill_of_their_server(start_server, start, busy):
    server = start_server()
    kernels = [start(server) for _ in range(2)]
    pids = [kernel.process.pid for kernel in kernels]
    if busy:
        for kernel in kernels:
            kernel.wait_for_text(kernel.begin("print('begun', flush=True)\nwhile True: pass"), "b")
    psutil.Process(server["pid"]).send_signal(signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in pids), what="the kernels to end")


def test_kernel_ends_with_its_server(start_server, start, kernel_servers, connection_file):
    server = start_server()
    kernel = start(server)
    children = started_processes(kernel)
    pid = kernel.process.pid
    stopped = kernel_servers.keeper.delete(server["name"]).json()["stop_report"]
    assert (stopped["method"], stopped["kernels_stopped"]) == ("shutdown", [kernel.id])
    assert not psutil.pid_exists(pid)
    assert not any(alive(child.pid) for child in children)
    assert not connection_file(kernel).exists()

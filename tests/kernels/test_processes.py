"""Processes and threads that cells start."""

from __future__ import annotations

import pytest

TASKS = """
import multiprocessing, os
from multiprocessing import shared_memory

def square(number):
    return number * number

def describe():
    parent = multiprocessing.parent_process()
    return __name__, multiprocessing.current_process().name, parent.pid

def fill(name):
    block = shared_memory.SharedMemory(name)
    block.buf[:4] = b"done"
    block.close()

def put(queue, lock):
    with lock:
        queue.put(os.getpid())
"""


@pytest.fixture
def kernel(start, server, directory):
    """A kernel in a directory with an importable module."""
    (directory / "tasks.py").write_text(TASKS)
    kernel = start(server, path=directory.name)
    kernel.run("import concurrent.futures, multiprocessing, os, sys, threading\nimport tasks")
    return kernel


METHODS = ["fork", "spawn", "forkserver"]


@pytest.mark.parametrize("method", METHODS)
def test_multiprocessing_works(kernel, method):
    kernel.run(f"context = multiprocessing.get_context({method!r})")
    assert kernel.value(
        "with context.Pool(2) as pool:\n    found = pool.map(tasks.square, range(5))\nfound"
    ) == [0, 1, 4, 9, 16]
    name, process, parent = kernel.value(
        "with concurrent.futures.ProcessPoolExecutor(1, context) as pool:\n"
        "    found = pool.submit(tasks.describe).result()\n"
        "found"
    )
    assert name == "tasks"
    assert process.startswith(
        {"fork": "Fork", "spawn": "Spawn", "forkserver": "ForkServer"}[method]
    )
    assert parent == kernel.value("os.getpid()")
    child, seen = kernel.value(
        "queue, lock = context.Queue(), context.Lock()\n"
        "process = context.Process(target=tasks.put, args=(queue, lock))\n"
        "process.start(); seen = queue.get(); process.join()\n"
        "process.pid, seen"
    )
    assert child == seen
    assert kernel.value("process.exitcode") == 0


@pytest.mark.parametrize("method", METHODS)
def test_shared_memory_works_and_is_removed(kernel, method):
    found = kernel.value(
        "from multiprocessing import shared_memory\n"
        "block = shared_memory.SharedMemory(create=True, size=8)\n"
        f"process = multiprocessing.get_context({method!r}).Process(\n"
        "    target=tasks.fill, args=(block.name,))\n"
        "process.start(); process.join()\n"
        "found = bytes(block.buf[:4])\n"
        "block.close(); block.unlink()\n"
        "found"
    )
    assert found == b"done"
    assert kernel.value("os.path.exists('/dev/shm/' + block.name)") is False


def test_functions_of_the_notebook_run_in_forked_processes(kernel):
    found = kernel.value(
        "factor = 3\n"
        "def times(number): return number * factor\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    found = pool.map(times, range(4))\n"
        "found"
    )
    assert found == [0, 3, 6, 9]


def test_processes_are_children_of_the_kernel_in_its_session(kernel):
    kernel.run("import subprocess\nchild = subprocess.Popen(['sleep', '1000'])")
    parent, group, session = kernel.value(
        "int(open(f'/proc/{child.pid}/stat').read().split()[3]), "
        "os.getpgid(child.pid), os.getsid(child.pid)"
    )
    assert {parent, group, session} == {kernel.value("os.getpid()")}


def test_exit_codes_of_processes_are_known(kernel):
    assert kernel.value("import subprocess\nsubprocess.run('exit 3', shell=True).returncode") == 3
    assert kernel.value("os.waitstatus_to_exitcode(os.system('exit 4'))") == 4
    pid_and_code = "pid = os.fork()\nif pid == 0: os._exit(5)\nos.waitpid(pid, 0) == (pid, 5 << 8)"
    assert kernel.value(pid_and_code) is True
    assert kernel.execute("!exit 6").status == "ok"
    assert kernel.value("_exit_code") == 6


def test_processes_inherit_no_descriptors_of_the_kernel(kernel):
    found = kernel.value(
        "import subprocess\n"
        "subprocess.run(['ls', '/proc/self/fd'], close_fds=False, capture_output=True, text=True)"
        ".stdout.split()"
    )
    # The last one is that of the listed directory.
    assert found == ["0", "1", "2", "3"]


def test_asyncio_subprocess_works(kernel):
    found = kernel.value(
        "import asyncio\n"
        "process = await asyncio.create_subprocess_exec(\n"
        "    'sh', '-c', 'cat; exit 3', stdin=-1, stdout=-1)\n"
        "output, _ = await process.communicate(b'text')\n"
        "output, process.returncode"
    )
    assert found == (b"text", 3)


def test_background_tasks_run_between_cells(kernel):
    kernel.run(
        "import asyncio\nseen = []\n"
        "async def count():\n"
        "    for number in range(3):\n"
        "        await asyncio.sleep(0.01)\n"
        "        seen.append(number)\n"
        "task = asyncio.create_task(count())"
    )
    assert kernel.value("await task\nseen") == [0, 1, 2]


def test_thread_pools_and_thread_local_state_work(kernel):
    found = kernel.value(
        "local = threading.local()\n"
        "def work(number):\n"
        "    local.number = number\n"
        "    return local.number, threading.current_thread() is threading.main_thread()\n"
        "with concurrent.futures.ThreadPoolExecutor(4) as pool:\n"
        "    found = list(pool.map(work, range(8)))\n"
        "found"
    )
    assert found == [(number, False) for number in range(8)]
    assert kernel.value("threading.current_thread() is threading.main_thread()") is True
    assert kernel.value("threading.main_thread().native_id == os.getpid()") is True

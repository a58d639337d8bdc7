"""An interrupt ends what a cell does, and the kernel works on."""

from __future__ import annotations

import pytest

from harness import alive

INTERRUPTED = {
    "a loop": "print('begun', flush=True)\nwhile True: pass",
    "a sleep": "import time\nprint('begun', flush=True)\ntime.sleep(1000)",
    "a lock": (
        "import threading\nlock = threading.Lock()\nlock.acquire()\n"
        "print('begun', flush=True)\nlock.acquire()"
    ),
    "a subprocess": "import subprocess\nsubprocess.run('echo begun; exec sleep 1000', shell=True)",
}


@pytest.mark.parametrize("what", INTERRUPTED)
def test_interrupt_raises_keyboardinterrupt_in_a_cell_and_the_next_one_runs(kernel, what):
    process = kernel.process
    cell = kernel.begin(INTERRUPTED[what])
    kernel.wait_for_text(cell, "begun")
    kernel.interrupt()
    reply = kernel.finish(cell)
    assert (reply.status, reply.error) == ("error", "KeyboardInterrupt: ")
    assert kernel.value("6 * 7") == 42
    assert kernel.process == process
    assert process.children() == []


def test_interrupt_ends_a_shell_command_but_not_its_cell(kernel):
    process = kernel.process
    cell = kernel.begin("!echo begun; exec sleep 1000\nprint('after')")
    kernel.wait_for_text(cell, "begun")
    (child,) = process.children()
    kernel.interrupt()
    assert kernel.finish(cell).status == "ok"
    assert "after" in kernel.printed(cell)
    assert not alive(child.pid)
    assert kernel.process == process


def test_interrupt_ends_an_awaited_coroutine_at_the_next_event(kernel):
    """ipykernel cancels it without waking its event loop, which the next request does."""
    cell = kernel.begin("import asyncio\nprint('begun', flush=True)\nawait asyncio.sleep(1000)")
    kernel.wait_for_text(cell, "begun")
    kernel.interrupt()
    assert kernel.value("6 * 7") == 42
    reply = kernel.finish(cell)
    assert (reply.status, reply.error) == ("error", "CancelledError: ")


def test_interrupt_of_an_idle_kernel_changes_nothing(kernel):
    process = kernel.process
    kernel.run("x = 42")
    for _ in range(3):
        kernel.interrupt()
    assert kernel.value("x") == 42
    assert kernel.process == process


def test_interrupt_does_not_reach_the_server_or_other_kernels(kernel, start, server):
    other = start(server)
    waits = other.begin("import time\nprint('begun', flush=True)\ntime.sleep(0.5)\nprint('ended')")
    other.wait_for_text(waits, "begun")
    loop = kernel.begin(INTERRUPTED["a loop"])
    kernel.wait_for_text(loop, "begun")
    kernel.interrupt()
    assert kernel.finish(loop).error == "KeyboardInterrupt: "
    assert other.finish(waits) == ("ok", "begun\nended\n", "", None, None)
    assert alive(server["pid"])


def test_sigint_handler_of_a_cell_is_called(kernel):
    """A cell may handle the signal itself."""
    cell = kernel.begin(
        "import signal\n"
        "caught = []\n"
        "before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))\n"
        "print('begun', flush=True)\n"
        "while not caught: signal.pause()\n"
        "print(before is signal.default_int_handler)"
    )
    kernel.wait_for_text(cell, "begun")
    kernel.interrupt()
    assert kernel.finish(cell).stdout == "begun\nTrue\n"
    assert kernel.value("caught") == [1]

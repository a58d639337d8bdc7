"""What a notebook shows of a cell: output of every kind, input, and errors."""

from __future__ import annotations

import pytest


@pytest.fixture
def kernel(shared_kernel):
    return shared_kernel


OUTPUT = {
    "print": ("print('text')", "text\n", ""),
    "print to stderr": ("import sys\nprint('text', file=sys.stderr)", "", "text\n"),
    "logging": ("import logging\nlogging.warning('text')", "", "WARNING:root:text\n"),
    "logging of info": ("import logging\nlogging.info('text')", "", ""),
    "write without newline": ("import sys\ndone = sys.stdout.write('text')", "text", ""),
    "shell command": ("!echo text", "text\r\n", ""),
    "shell command to stderr": ("!echo text >&2", "text\r\n", ""),
    "script magic": ("%%bash\necho text\necho more >&2", "text\n", "more\n"),
    "top-level await": ("import asyncio\nprint(await asyncio.sleep(0, 'text'))", "text\n", ""),
    "not ASCII": ("print('\u00e4\u2713\U0001f40d')", "\u00e4\u2713\U0001f40d\n", ""),
}


def test_cell_shows_its_output(kernel):
    shown = {what: kernel.execute(code) for what, (code, *_) in OUTPUT.items()}
    assert {what: (reply.status, reply.stdout, reply.stderr) for what, reply in shown.items()} == {
        what: ("ok", *expected) for what, (_, *expected) in OUTPUT.items()
    }


BELOW_PYTHON = {
    "os.write": "import os\ndone = os.write({fd}, b'text\\n')",
    "subprocess": "import subprocess\ndone = subprocess.run('echo text >&{fd}', shell=True)",
    "C library": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "done = libc.dprintf({fd}, b'text\\n')\ndone = libc.fflush(None)"
    ),
    "fork": (
        "import os\npid = os.fork()\n"
        "if pid == 0:\n    os.write({fd}, b'text\\n')\n    os._exit(0)\ndone = os.waitpid(pid, 0)"
    ),
}


def test_cell_shows_what_is_written_to_its_file_descriptors(kernel):
    """It is read from a pipe, and may arrive after the cell has ended."""
    for fd, stream in ((1, "stdout"), (2, "stderr")):
        for code in BELOW_PYTHON.values():
            cell = kernel.begin(code.format(fd=fd))
            kernel.wait_for_kind("stream", cell, name=stream, text="text\n")
            assert kernel.finish(cell).status == "ok"


def test_cell_shows_what_processes_of_multiprocessing_print(kernel):
    cell = kernel.begin(
        "import multiprocessing\n"
        "other = multiprocessing.get_context('fork').Process(target=print, args=('text',))\n"
        "other.start(); other.join()"
    )
    kernel.wait_for_text(cell, "text\n")
    assert kernel.finish(cell).status == "ok"


def test_warnings_of_a_cell_are_shown_once_and_those_of_modules_are_not(kernel, directory):
    code = "import warnings\nfor n in range(2): warnings.warn('beware', DeprecationWarning)"
    reply = kernel.execute(code)
    assert reply.stderr.count("DeprecationWarning: beware") == 1
    (directory / "deprecated.py").write_text(code)
    kernel.run(f"import sys; sys.path.insert(0, {str(directory)!r})\nimport deprecated")


def test_threads_print_into_the_cell_that_runs(kernel):
    cell = kernel.begin(
        "import threading\n"
        "go = threading.Event()\n"
        "thread = threading.Thread(target=lambda: (go.wait(), print('late')))\n"
        "thread.start()"
    )
    assert kernel.finish(cell).stdout == ""
    assert kernel.run("go.set(); thread.join()\nprint('own')") == "late\nown\n"


def test_value_and_display_data_of_a_cell_are_shown(kernel):
    assert kernel.execute("6 * 7").result == "42"
    assert kernel.execute("_ + 1").result == "43"
    assert kernel.execute("x = 1").result is None
    cell = kernel.begin("from IPython.display import HTML, display\ndisplay(HTML('<b>bold</b>'))")
    kernel.finish(cell)
    ((_, shown),) = [answer for answer in kernel.answers(cell) if answer[0] == "display_data"]
    assert shown["data"]["text/html"] == "<b>bold</b>"


def test_error_of_a_cell_has_its_traceback(kernel):
    cell = kernel.begin("def broken():\n    return 1 / 0\nbroken()")
    reply = kernel.finish(cell)
    assert (reply.status, reply.error) == ("error", "ZeroDivisionError: division by zero")
    ((_, error),) = [answer for answer in kernel.answers(cell) if answer[0] == "error"]
    frames = "".join(error["traceback"])
    assert "broken" in frames
    assert "ipykernel_launcher" not in frames
    assert "labkeeper" not in frames


@pytest.mark.parametrize("code", ["import sys; sys.exit(3)", "raise SystemExit(3)"])
def test_systemexit_ends_the_cell_and_not_the_kernel(kernel, code):
    process = kernel.process
    assert kernel.execute(code).error == "SystemExit: 3"
    assert kernel.process == process


# Input


def test_questions_of_a_cell_are_answered_by_the_notebook(kernel):
    reply = kernel.execute(
        "import getpass\nprint((input('name? '), getpass.getpass('secret? '), input()))",
        ["me", "hunter2", ""],
    )
    assert reply == ("ok", "('me', 'hunter2', '')\n", "", None, None)
    asked = [
        message["content"]
        for message in kernel.messages
        if message["header"]["msg_type"] == "input_request"
    ][-3:]
    assert asked == [
        {"prompt": "name? ", "password": False},
        {"prompt": "secret? ", "password": True},
        {"prompt": "", "password": False},
    ]


def test_question_that_nobody_can_answer_fails(kernel):
    assert kernel.execute("input()").error.startswith("StdinNotImplementedError: ")


STOPS = "def stops():\n    x = 41\n    {stop}\n    return x\nprint('after', stops())"


def test_pdb_in_a_cell_is_answered_by_the_notebook(kernel):
    cell = STOPS.format(stop="import pdb; pdb.set_trace()")
    reply = kernel.execute(cell, ["x += 1", "p x + 1", "c"])
    assert reply.status == "ok"
    assert "43" in reply.stdout.split()
    assert reply.stdout.endswith("after 42\n")


def test_breakpoint_without_a_debugger_is_passed_over(kernel):
    """It belongs to debugpy, which every kernel loads; see test_debugger.py for one attached."""
    assert kernel.run(STOPS.format(stop="breakpoint()")) == "after 41\n"


def test_post_mortem_debugger_is_answered_by_the_notebook(kernel):
    kernel.execute("def broken(value):\n    return 1 / value\nbroken(0)")
    reply = kernel.execute("%debug", ["p value + 70", "q"])
    assert (reply.status, "70" in reply.stdout.split()) == ("ok", True)


def test_interrupt_ends_a_question(kernel):
    cell = kernel.begin("input('name? ')", allow_stdin=True)
    kernel.wait_for_kind("input_request", cell)
    kernel.interrupt()
    assert kernel.finish(cell).error.startswith("KeyboardInterrupt")
    assert kernel.value("6 * 7") == 42


def test_standard_input_of_a_cell_is_empty(kernel):
    assert kernel.value("__import__('os').read(0, 1)") == b""
    assert kernel.value("__import__('sys').stdin.read()") == ""
    code = "import subprocess\nsubprocess.run('cat', stdout=subprocess.PIPE, timeout=60).stdout"
    assert kernel.value(code) == b""

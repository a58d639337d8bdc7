"""`make run` starts a keeper and a first Lab, shows its link, and cleans up after Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from harness import (
    PATIENCE,
    free_port,
    kill_all,
    plain_python,
    processes_marked,
    processes_where,
    until,
)

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CTRL_C = b"\x03"
LINK = re.compile(r"http://\S+/open/[\w-]+")


class Run:
    """`scripts/run` as a session leader, as in a terminal window, with its output so far."""

    def __init__(self, base, *, at_terminal):
        self.temporary = base / "tmp"
        self.notebooks = base / "notebooks"
        self.temporary.mkdir()
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith("LABKEEPER_")
        }
        env = clean | {
            "TMPDIR": str(self.temporary),
            "HOME": str(base),
            "LABKEEPER_NOTEBOOK_DIR": str(self.notebooks),
            "LABKEEPER_PORT": str(free_port()),
            "LABKEEPER_LAB_PORT": str(free_port()),
            "LABKEEPER_JUPYTER_PYTHON": str(plain_python(base / "bin")),
        }
        self.output = ""
        self.reading, writing = os.openpty() if at_terminal else os.pipe()
        # The first terminal that a session leader opens becomes its controlling terminal.
        command = (
            ["sh", "-c", 'exec <"$0" >"$0" 2>&1 "$@"', os.ttyname(writing)] if at_terminal else []
        )
        self.process = subprocess.Popen(
            [*command, ROOT / "scripts" / "run", BIN],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(writing)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # EIO: the other end of the terminal is closed
            while piece := os.read(self.reading, 65536):
                self.output += piece.decode(errors="replace")

    def wait_for_output(self, text):
        """Wait until the output contains a text."""
        until(
            lambda: text in self.output or self.process.poll() is not None,
            what=f"{text!r} in the output",
        )
        assert text in self.output, self.output

    def wait_for_exit(self):
        """Wait for the exit, and return the exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def leftovers(self):
        """Return what is left: processes, and files in the temporary directory."""
        with contextlib.suppress(FileNotFoundError):
            return [*self.members(), *processes_marked(self.temporary), *self.temporary.iterdir()]
        return []

    def members(self):
        """Return every live process of the session: the script and the keeper."""
        return processes_where(lambda process: os.getsid(process.pid) == self.process.pid)

    def close(self):
        kill_all([*self.members(), *processes_marked(self.temporary)])
        self.wait_for_exit()
        os.close(self.reading)


@pytest.fixture
def make_run(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(**options):
            running = Run(tmp_path, **options)
            stack.callback(running.close)
            return running

        yield make


def test_link_shown_at_a_terminal_opens_the_lab_and_ctrl_c_cleans_up(make_run):
    running = make_run(at_terminal=True)
    running.wait_for_output("Ctrl-C stops everything.")
    assert running.notebooks.is_dir()
    link = LINK.search(running.output)
    assert link, running.output
    with httpx.Client(timeout=PATIENCE, trust_env=False) as browser:
        page = browser.get(link[0], follow_redirects=True)
        assert (page.status_code, "JupyterLab" in page.text) == (200, True)
    assert httpx.get(page.url, trust_env=False).status_code == 401

    os.write(running.reading, CTRL_C)
    assert running.wait_for_exit() == 0, running.output
    assert running.leftovers() == []
    assert "Traceback" not in running.output


def test_ctrl_c_during_startup_cleans_up(make_run):
    running = make_run(at_terminal=True)
    running.wait_for_output("starting JupyterLab ...")
    os.write(running.reading, CTRL_C)
    assert running.wait_for_exit() == 0, running.output
    assert running.leftovers() == []


def test_output_without_a_terminal_has_no_secrets_but_explains_the_link(make_run):
    running = make_run(at_terminal=False)
    running.wait_for_output("Ctrl-C stops everything.")
    export = re.search(r"In another terminal: (export .*)", running.output)[1]
    assert "labkeeper open --print" in running.output
    # Paste the command into another terminal, with no other way to find the keeper.
    script = f'{export}\necho "$LABKEEPER_STATE_DIR"; labkeeper token; labkeeper open --print\n'
    elsewhere = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"]}
    pasted = subprocess.run(
        ["sh", "-eu"],
        input=script,
        env=elsewhere,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    state, owners, link = pasted.stdout.splitlines()
    assert Path(state).parent == running.temporary
    assert (Path(state) / "token").read_text().strip() == owners
    assert LINK.fullmatch(link)
    assert link not in running.output
    assert owners not in running.output
    assert "token=" not in running.output

    running.process.send_signal(signal.SIGTERM)
    assert running.wait_for_exit() == 0, running.output
    assert running.leftovers() == []

"""What `make run` does: a keeper and a first Lab, a link that opens it, and nothing left after Ctrl-C."""

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
LINK = re.compile(r"http://\S+[?&]token=\w+")


class Run:
    """`scripts/run`, leading a session of its own as in a terminal's window, and all that it has said."""

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
        self.said = ""
        self.reading, writing = os.openpty() if at_terminal else os.pipe()
        # The first terminal that the leader of a session opens is the one whose Ctrl-C reaches it.
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
        with contextlib.suppress(OSError):  # EIO: nobody holds the terminal's other end any more
            while piece := os.read(self.reading, 65536):
                self.said += piece.decode(errors="replace")

    def hears(self, text):
        """Wait until it has said something."""
        until(
            lambda: text in self.said or self.process.poll() is not None, what=f"{text!r} is said"
        )
        assert text in self.said, self.said

    def ends(self):
        """Wait for its end; give its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def left(self):
        """Give what is left of it: processes, and what it made in the temporary directory."""
        with contextlib.suppress(FileNotFoundError):
            return [*self.members(), *processes_marked(self.temporary), *self.temporary.iterdir()]
        return []

    def members(self):
        """Every live process of its session: the script and the keeper."""
        return processes_where(lambda process: os.getsid(process.pid) == self.process.pid)

    def close(self):
        kill_all([*self.members(), *processes_marked(self.temporary)])
        self.ends()
        os.close(self.reading)


@pytest.fixture
def make_run(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(**options):
            running = Run(tmp_path, **options)
            stack.callback(running.close)
            return running

        yield make


def test_at_a_terminal_the_link_opens_the_lab_and_ctrl_c_leaves_nothing(make_run):
    running = make_run(at_terminal=True)
    running.hears("Ctrl-C stops everything.")
    assert running.notebooks.is_dir()
    link = LINK.search(running.said)
    assert link, running.said
    page = httpx.get(link[0], follow_redirects=True, trust_env=False)
    assert page.status_code == 200
    assert "JupyterLab" in page.text
    assert httpx.get(
        link[0].partition("?")[0], follow_redirects=True, trust_env=False
    ).url.path.endswith("/login")

    os.write(running.reading, CTRL_C)
    assert running.ends() == 0, running.said
    assert running.left() == []
    assert "Traceback" not in running.said


def test_ctrl_c_during_the_start_leaves_nothing_either(make_run):
    running = make_run(at_terminal=True)
    running.hears("starting JupyterLab ...")
    os.write(running.reading, CTRL_C)
    assert running.ends() == 0, running.said
    assert running.left() == []


def test_without_a_terminal_no_secret_is_said_but_how_to_get_the_link(make_run):
    running = make_run(at_terminal=False)
    running.hears("Ctrl-C stops everything.")
    export = re.search(r"In another terminal: (export .*)", running.said)[1]
    assert "labkeeper open --print" in running.said
    # Pasted into another terminal, where nothing else tells of the keeper.
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
    assert link.partition("token=")[2] not in running.said
    assert owners not in running.said
    assert "token=" not in running.said

    running.process.send_signal(signal.SIGTERM)
    assert running.ends() == 0, running.said
    assert running.left() == []

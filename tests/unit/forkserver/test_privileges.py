"""Privileges are dropped for good, also for child processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from labkeeper.forkserver import privileges

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

SHOW = "import sys; print(open('/proc/self/status').read())"


def output_after(calls, then=f"exec({SHOW!r})"):
    """Run calls in a process of its own, and return its output."""
    code = f"from labkeeper.forkserver.privileges import *\n{calls}\n{then}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_no_new_privileges_applies_to_child_processes():
    started = (
        f"import subprocess; print(subprocess.run([{sys.executable!r}, '-c', {SHOW!r}],"
        " capture_output=True, text=True).stdout)"
    )
    assert "NoNewPrivs:\t1" in output_after("gain_nothing()")
    assert "NoNewPrivs:\t1" in output_after("gain_nothing()", started)


@pytest.mark.root
def test_a_hidden_process_is_closed_to_its_user_and_programs_it_executes_are_not():
    def owner(calls, then="import os; print(os.stat('/proc/self/environ').st_uid)"):
        become = "import os, subprocess; os.setresgid(1, 1, 1); os.setresuid(1, 1, 1)"
        return output_after(f"{calls}; {become}; {calls}", then).strip()

    assert owner("hide()") == "0"
    assert (
        owner(
            "hide()",
            "import subprocess;"
            " print(subprocess.check_output(['stat', '-c', '%u', '/proc/self/environ']))",
        )
        == "b'1\\n'"
    )


@pytest.mark.root
def test_dropping_the_bounding_set_affects_only_the_calling_thread():
    thread = "import threading; t = threading.Thread(target=drop_bounding_set); t.start(); t.join()"
    assert "CapBnd:\t0000000000000000" in output_after("drop_bounding_set()")
    assert "CapBnd:\t0000000000000000" not in output_after(thread)


def test_on_other_systems_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    privileges.hide()
    privileges.gain_nothing()
    privileges.drop_bounding_set()

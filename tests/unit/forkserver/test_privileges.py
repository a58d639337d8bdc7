"""What is given up is given up for good, by whom it was and by what that starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from labkeeper.forkserver import privileges

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

SHOW = "import sys; print(open('/proc/self/status').read())"


def after(calls, then=f"exec({SHOW!r})"):
    """Run calls in a process of its own; give what that says afterwards."""
    code = f"from labkeeper.forkserver.privileges import *\n{calls}\n{then}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_no_rights_are_gained_any_more_not_by_children_either():
    started = f"import subprocess; print(subprocess.run([{sys.executable!r}, '-c', {SHOW!r}], capture_output=True, text=True).stdout)"
    assert "NoNewPrivs:\t1" in after("gain_nothing()")
    assert "NoNewPrivs:\t1" in after("gain_nothing()", started)


@pytest.mark.root
def test_what_is_hidden_is_closed_to_others_of_its_user_and_open_again_in_what_it_executes():
    def owner(calls, then="import os; print(os.stat('/proc/self/environ').st_uid)"):
        become = "import os, subprocess; os.setresgid(1, 1, 1); os.setresuid(1, 1, 1)"
        return after(f"{calls}; {become}; {calls}", then).strip()

    assert owner("hide()") == "0"
    assert (
        owner(
            "hide()",
            "import subprocess; print(subprocess.check_output(['stat', '-c', '%u', '/proc/self/environ']))",
        )
        == "b'1\\n'"
    )


@pytest.mark.root
def test_a_thread_that_drops_its_bounding_set_keeps_that_of_others():
    thread = "import threading; t = threading.Thread(target=drop_bounding_set); t.start(); t.join()"
    assert "CapBnd:\t0000000000000000" in after("drop_bounding_set()")
    assert "CapBnd:\t0000000000000000" not in after(thread)


def test_elsewhere_there_is_nothing_to_give_up(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    privileges.hide()
    privileges.gain_nothing()
    privileges.drop_bounding_set()

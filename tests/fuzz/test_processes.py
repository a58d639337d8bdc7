"""Fuzz process names, which /proc shows unescaped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import FUZZ
from labkeeper.backends.local import usage
from labkeeper.backends.local.processes import Process
from labkeeper.forkserver import marks

ME = os.getpid()
COMM = Path("/proc/self/comm")
NAMES = st.binary(min_size=1, max_size=15).filter(lambda name: b"\0" not in name) | st.lists(
    st.sampled_from([b")", b"(", b" ", b"\n", b"R", b"0", b"\t", b") Z 1"]), min_size=1, max_size=8
).map(b"".join)


@pytest.fixture
def restore_own_name():
    """Restore the name of this process after a test."""
    name = COMM.read_bytes().rstrip(b"\n")
    yield
    COMM.write_bytes(name)


@pytest.mark.skipif(not COMM.exists(), reason="needs /proc")
@FUZZ
@given(name=NAMES)
@example(name=b") Z 1 1 1 (\n")
def test_proc_files_are_parsed_whatever_the_process_name(restore_own_name, name):
    COMM.write_bytes(name[:15])
    assert marks.stat(ME).parent == os.getppid()
    assert Process.find(ME).alive()
    found = usage._stats([ME])[ME]
    assert (found.parent, found.started) == (os.getppid(), marks.started(ME))
    assert found.threads >= 1

"""Processes: starting one, proving that some are gone, and what they hold of memory and processor."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from progress import BenchError
from web import PATIENCE


def spawn(
    command: Sequence[str | Path], env: Mapping[str, str], cwd: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that Ctrl-C at the terminal reaches the bench alone."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes], log: Path, patience: float = 60.0) -> None:
    """Ask a program to end, and wait for it."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        raise BenchError(f"a program did not end within {patience:.0f} s:\n{tail(log)}") from None


def tail(log: Path, count: int = 30) -> str:
    """Give the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


class Family:
    """A server and all that it has started, held by descriptors: the kernel tells of each end, so nothing is polled."""

    def __init__(self, pid: int) -> None:
        children = psutil.Process(pid).children(recursive=True)
        self._held = [os.pidfd_open(each) for each in (pid, *(child.pid for child in children))]

    def __len__(self) -> int:
        return len(self._held)

    def wait_until_gone(self) -> None:
        """Return when all have ended."""
        until = time.monotonic() + PATIENCE
        for held in self._held:
            poll = select.poll()
            poll.register(held, select.POLLIN)
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise BenchError("a server, or a kernel of it, did not end")

    def close(self) -> None:
        """Let go of them."""
        for held in self._held:
            os.close(held)


@contextlib.contextmanager
def family_of(pid: int) -> Iterator[Family]:
    """Hold a server and all that it has started."""
    family = Family(pid)
    try:
        yield family
    finally:
        family.close()


@dataclass(frozen=True, slots=True)
class ActivityHistory:
    """In bytes. USS: what would be free if it ended. PSS: that, and its share of what it shares."""

    rss: int
    pss: int
    uss: int


def memory_of(pid: int) -> ActivityHistory:
    """Read /proc/PID/smaps_rollup (proc_pid_smaps_rollup(5))."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return ActivityHistory(
        found["Rss"], found["Pss"], found["Private_Clean"] + found["Private_Dirty"]
    )


def processor_seconds(pid: int) -> float:
    """Say how much processor time a process has used; its children do not count."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)

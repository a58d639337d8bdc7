"""Start and stop processes, wait until a tree of them has ended, and read their resource usage."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from progress import BenchError
from web import TIMEOUT


def spawn(
    command: Sequence[str | Path], env: Mapping[str, str], cwd: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start a program in its own session, so that Ctrl-C at the terminal reaches only the bench."""
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
    """Send SIGTERM to a program, and wait until it has ended."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        raise BenchError(f"a program did not exit within {patience:.0f} s:\n{tail(log)}") from None


def tail(log: Path, count: int = 30) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


_MARK = "LABKEEPER_SERVER"
"""The variable that marks all processes of a server of labkeeper."""


class ProcessTree:
    """A server and its kernels, held by pidfds, which report their end without polling."""

    def __init__(self, pid: int) -> None:
        self._pidfds = [os.pidfd_open(each) for each in {pid, *below(pid)}]

    def __len__(self) -> int:
        return len(self._pidfds)

    def wait_until_gone(self) -> None:
        """Return when all processes have ended."""
        until = time.monotonic() + TIMEOUT
        for pidfd in self._pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise BenchError("a server or one of its kernels did not end")

    def close(self) -> None:
        """Close the pidfds."""
        for pidfd in self._pidfds:
            os.close(pidfd)


def below(pid: int) -> set[int]:
    """Return the other processes of a server: its descendants, and those with its mark.

    Forked kernels, and the zygote that forks them, are no descendants.
    """
    server = psutil.Process(pid)
    found = {child.pid for child in server.children(recursive=True)}
    if mark := _mark(server):
        found |= {each.pid for each in psutil.process_iter() if _mark(each) == mark}
    return found - {pid}


def _mark(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ().get(_MARK, "").strip()
    return ""


@contextlib.contextmanager
def process_tree_of(pid: int) -> Iterator[ProcessTree]:
    """Hold a server and its kernels, as of now."""
    tree = ProcessTree(pid)
    try:
        yield tree
    finally:
        tree.close()


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process, in bytes.

    USS is what would be free if it ended; PSS adds its share of shared memory.
    """

    rss: int
    pss: int
    uss: int


def memory_of(pid: int) -> Memory:
    """Return the memory of a process, from smaps_rollup (proc_pid_smaps_rollup(5))."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return Memory(found["Rss"], found["Pss"], found["Private_Clean"] + found["Private_Dirty"])


def memory_of_all(pids: Iterable[int]) -> Memory:
    """Return the memory of several processes, without those that have ended meanwhile."""
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(memory_of(pid))
    return Memory(*(sum(getattr(each, kind) for each in found) for kind in ("rss", "pss", "uss")))


def processor_seconds(pid: int) -> float:
    """Return the CPU time of a process, in seconds, without its children."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def mentions(process: psutil.Process, word: str) -> bool:
    """Return whether the command line of a process contains a word."""
    try:
        return any(word in piece for piece in process.cmdline())
    except psutil.Error:
        return False

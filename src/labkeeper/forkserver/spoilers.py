"""What a process must not have when it is forked, because its children would share it, or lack it.

Libraries may start or open such things when they are imported.
"""

from __future__ import annotations

import contextlib
import os
import time

from .programs import living

_HARMLESS = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"}
_PREPARED = {"jemalloc_bg_thd"}
"""Names of threads of libraries that prepare for forks: the work is done by other threads then.

Source: jemalloc, `background_thread_postfork_child`. It comes with pyarrow, which pandas imports.
"""
_GONE_SECONDS = 0.2
"""Seconds in which threads that end at a fork have disappeared from /proc."""


def spoilers() -> set[str]:
    """Return what this process has of them, in words that tell what a module did.

    They are threads, programs, devices, shared memory, open sockets, pipes and the like.
    Threads that end at a fork are ended, like those of OpenBLAS: it starts them again when they are
    needed, and one started without them would have one thread for good.
    """
    threads = _threads()
    if threads:
        threads = _threads_after_a_fork()
    found = {f"starts a thread ({name}, {number})" for number, name in threads.items()}
    found.update(f"starts a program ({pid})" for pid in living())
    found.update(f"shares memory with other processes ({path})" for path in _shared_memory())
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith("/dev/") and target not in _HARMLESS:
            found.add(f"holds a device ({target})")
        elif not target.startswith("/"):
            found.add(f"keeps something open ({target})")
    return found


def _threads() -> dict[str, str]:
    """Return the names of threads besides the main one, by number; except prepared ones."""
    found = {}
    for number in os.listdir("/proc/self/task"):
        # It may have ended meanwhile.
        with contextlib.suppress(OSError), open(f"/proc/self/task/{number}/comm") as file:
            found[number] = file.read().strip()
    found.pop(str(os.getpid()), None)
    return {number: name for number, name in found.items() if name not in _PREPARED}


def _threads_after_a_fork() -> dict[str, str]:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    until = time.monotonic() + _GONE_SECONDS
    while (threads := _threads()) and time.monotonic() < until:
        time.sleep(0.001)
    return threads


def _shared_memory() -> set[str]:
    """Return the files of memory that this process can write to and others see."""
    with open("/proc/self/maps") as maps:
        fields = (line.split(None, 5) for line in maps)
        return {rest[0].strip() for _, rights, _, _, _, *rest in fields if rights == "rw-s"}

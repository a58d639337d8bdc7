"""Copies of memory pages, made ahead of time.

A forked process shares each page with its parent until one of them writes to it; then it is copied.
After Jupyter's own code, that is the largest cost of a starting server. The pages it writes to are
always the same, so a rehearsal can find them, and a process that waits for its launch can have them
copied while no client waits.
"""

from __future__ import annotations

import ctypes
import os
import struct

_PAGE = os.sysconf("SC_PAGE_SIZE")
_ENTRY = 8
"""Bytes per page in pagemap."""
_PRESENT = 1 << 63
_MAPPED_ONCE = 1 << 56
"""Bits of a page; see the kernel's admin-guide/mm/pagemap."""
_MADV_POPULATE_WRITE = 23
"""From linux/mman.h; since Linux 5.14."""


def writable() -> list[tuple[int, int]]:
    """Return the memory that a fork shares until it is written to: start and end addresses."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, rights = line.split(" ", 2)[:2]
            if rights == "rw-p":
                first, _, end = addresses.partition("-")
                found.append((int(first, 16), int(end, 16)))
    return found


def copied(shared: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the parts of once shared memory that are private now: address and size in bytes."""
    runs: list[tuple[int, int]] = []
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            for first, end in shared:
                pagemap.seek(first // _PAGE * _ENTRY)
                entries = pagemap.read((end - first) // _PAGE * _ENTRY)
                for number, (entry,) in enumerate(struct.iter_unpack("=Q", entries)):
                    if entry & _PRESENT and entry & _MAPPED_ONCE:
                        address = first + number * _PAGE
                        if runs and sum(runs[-1]) == address:
                            runs[-1] = (runs[-1][0], runs[-1][1] + _PAGE)
                        else:
                            runs.append((address, _PAGE))
    except OSError:
        return []
    return runs


def copy(runs: list[tuple[int, int]]) -> None:
    """Copy these pages now. If the kernel cannot, they are copied when written to."""
    advise = ctypes.CDLL(None).madvise
    for address, size in runs:
        advise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)

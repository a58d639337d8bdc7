"""Search a process's own memory, in use or freed: code that it runs, and patterns."""

from __future__ import annotations

OWN_MEMORY = """
import ctypes, os, re
from pathlib import Path

class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]

def own_memory():
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, end = (int(number, 16) for number in line.split()[0].split("-"))
        content = ctypes.create_string_buffer(end - first)
        here, there = Piece(ctypes.addressof(content), end - first), Piece(first, end - first)
        if libc.process_vm_readv(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0:
            yield line, content

"""
"""Defines `own_memory`, which yields each mapping with its content."""

OWN_STATE = """
import gc, sys, types

def own_state():
    modules = [
        module
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType)
    ]
    seen = {id(sys.modules), *map(id, modules), *(id(vars(module)) for module in modules)}
    for module in modules:
        waiting = list(vars(module).values())
        while waiting:
            thing = waiting.pop()
            if isinstance(thing, (str, bytes)):
                yield module.__name__, thing
            elif id(thing) not in seen:
                seen.add(id(thing))
                waiting += gc.get_referents(thing)

"""
"""Defines `own_state`, which yields each string reachable from a module, with the module's name."""


def hidden(text):
    """Return a pattern that matches the text without containing it, since memory has it, too."""
    return "".join(f"[{letter}]" for letter in text)

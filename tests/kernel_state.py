"""What a cell can find out of its process, and how that differs between kernels."""

from __future__ import annotations

import json
import re
from pathlib import Path

SNAPSHOT = (Path(__file__).parent / "kernels" / "snapshot.py").read_text()
PARTS = ["process", "status", "descriptors", "interpreter", "libraries", "ipython"]


def normal(text, kernel):
    """Replace what differs between any two kernels, or between their servers."""
    server = kernel.server
    for given, name in (
        (kernel.id, "KERNEL"),
        (server["url"], "URL"),
        (str(server["pid"]), "PID"),
        (str(server["port"]), "PORT"),
    ):
        # Not within longer numbers: a pid of three digits stands in many.
        text = re.sub(rf"(?<![\d.]){re.escape(given)}(?!\d)", name, text)
    # The mark in the environment is filled with spaces.
    return re.sub(rf"\b{server['name']}\b *", "SERVER", text)


def snapshot(kernel, mark):
    """Return what a kernel reports in a cell, by part and name."""
    parts = ", ".join(f"'{part}': {part}()" for part in PARTS)
    code = f"{SNAPSHOT}\nprint('{mark}', json.dumps({{{parts}}}, default=str))"
    shown = kernel.run(code).partition(mark)[2]
    parts = json.loads(normal(shown, kernel))
    return {f"{part}: {what}": value for part in parts for what, value in parts[part].items()}


def expect_of_forked(kernel, theirs):
    """Change what an executed kernel reports to what a forked one must report."""
    # Its parent is the zygote, so it has a handle of its server, and the pipe that it reports its
    # ports to: it ends if either closes.
    theirs["process: parent"] = str(kernel.process.ppid())
    theirs["descriptors: kinds"] |= {
        "anon_inode:[pidfd]": 1,
        "pipe": theirs["descriptors: kinds"]["pipe"] + 1,
    }


def assert_same(ours, theirs):
    """Check that two kernels report the same."""
    differences = dict(_differences(ours, theirs))
    assert not differences, json.dumps(differences, indent=1)


def _differences(ours, theirs, name=""):
    """Yield what differs, in dictionaries by the names of their items."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        if ours != theirs:
            yield name, {"here": ours, "executed": theirs}
        return
    for item in ours.keys() | theirs.keys():
        yield from _differences(ours.get(item), theirs.get(item), f"{name}: {item}")

"""Resources that a test takes from a keeper: processes and threads, and disk space."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from harness import KeeperProcess, until
from labkeeper.backends.local import hierarchies

PIDS = (
    {**hierarchies.version_1(), **hierarchies.version_2()}.get("pids")
    if sys.platform == "linux"
    else None
)
needs_group = pytest.mark.skipif(
    PIDS is None, reason="needs control groups, and one for processes that can be written"
)


class Group:
    """A control group of a test."""

    def __init__(self):
        self.path = PIDS.base / f"labkeeper-test-{os.getpid()}"
        self.path.mkdir()

    def allow(self, count):
        (self.path / "pids.max").write_text(str(count))

    @property
    def count(self):
        """How many processes and threads are in it."""
        return int((self.path / "pids.current").read_text())

    def remove(self):
        until(lambda: self.count == 0, what="all processes in the control group to end")
        self.path.rmdir()


class GroupedKeeper(KeeperProcess):
    """A keeper in a control group of its own, together with its servers."""

    def __init__(self, base, group, **settings):
        super().__init__(base, **settings)
        self.group = group

    def command(self, *arguments):
        join = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
        return ["sh", "-c", join, "sh", self.group.path, *super().command(*arguments)]


class Disk:
    """A small disk, with space for the history and the write-ahead log of 200 chaos rounds."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", path], check=True
        )

    def fill(self):
        """Leave no space, not even in the last block of existing files."""
        for path in (self.path / "filler", *self.path.glob("*.log")):
            for size in (4096, 1):
                with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
                    while True:
                        file.write(b"x" * size)

    def exhaust_inodes(self):
        """Leave room for no further file or directory, however small."""
        count = os.statvfs(self.path).f_files - os.statvfs(self.path).f_ffree
        subprocess.run(
            ["mount", "-o", f"remount,nr_inodes={count}", "tmpfs", self.path], check=True
        )
        with pytest.raises(OSError, match="No space left"):
            (self.path / "one-more").touch()

    def free(self):
        (self.path / "filler").unlink()

    def make_read_only(self):
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)

    def remove(self):
        # A killed process may take a moment to release it.
        until(
            lambda: (
                subprocess.run(["umount", self.path], check=False, capture_output=True).returncode
                == 0
            ),
            what="the disk to be unmounted",
        )

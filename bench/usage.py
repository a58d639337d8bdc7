"""What it costs to measure 200 servers: `.venv/bin/python bench/usage.py`. Each is a shell with three children that sleep."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from labkeeper.backends.local import usage
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.processes import Process
from labkeeper.core.spec import ServerName
from labkeeper.forkserver.marks import MARK

SERVERS, ROUNDS = 200, 20


class _NoGroups(ControlGroups):
    def _of(self, name: ServerName) -> list[Path]:  # noqa: ARG002
        return []


def cost(meter: usage.Meter, processes: dict[ServerName, Process]) -> list[float]:
    """Give the milliseconds of a processor that each measurement took."""
    spent = []
    for _ in range(ROUNDS):
        before = time.process_time()
        found = meter.measure(processes)
        spent.append((time.process_time() - before) * 1000)
        assert len(found) == len(processes)
    return spent


def main() -> None:
    """Measure with control groups and without, and the dear part by itself."""
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        names = [ServerName(f"s{number}") for number in range(SERVERS)]
        children = {
            name: subprocess.Popen(
                ["/bin/sh", "-c", "sleep 600 & sleep 600 & sleep 600 & wait"],
                env={**os.environ, MARK: str(base / name)},
                start_new_session=True,
            )
            for name in names
        }
        groups = ControlGroups(base)
        time.sleep(2)
        try:
            processes = {
                name: found
                for name, child in children.items()
                if (found := Process.find(child.pid)) is not None
            }
            told = {"without groups": cost(usage.Meter(_NoGroups(base), base), processes)}
            for name, child in children.items():
                groups.hold(name, child.pid)
            told["with groups"] = cost(usage.Meter(groups, base), processes)
            for what, spent in told.items():
                sys.stdout.write(
                    f"{what}: first {spent[0]:.0f} ms, then {median(spent[2:]):.1f} ms for {SERVERS} servers\n"
                )
        finally:
            for child in children.values():
                os.killpg(child.pid, 9)
                child.wait()
            time.sleep(0.5)
            for name in names:
                groups.remove(name)
        before = time.process_time()
        usage._proportional([os.getpid()] * 100)  # noqa: SLF001
        sys.stdout.write(
            f"shared memory of one Python process: {(time.process_time() - before) * 10:.2f} ms\n"
        )


if __name__ == "__main__":
    main()

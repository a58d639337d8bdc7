"""Time the usage measurements of 200 servers: `.venv/bin/python bench/usage.py`.

Each "server" is a shell with three children that sleep.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from labkeeper.backends.local import usage
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.processes import Process
from labkeeper.core.spec import QualifiedName
from labkeeper.forkserver.marks import MARK

SERVERS, ROUNDS = 200, 20


class _NoGroups(ControlGroups):
    def _of(self, name: QualifiedName) -> list[Path]:  # noqa: ARG002
        return []


def cost(meter: usage.Meter, processes: dict[QualifiedName, Process]) -> list[float]:
    """Return the CPU time of each measurement, in milliseconds."""
    spent = []
    for _ in range(ROUNDS):
        before = time.process_time()
        found = meter.measure(processes)
        spent.append((time.process_time() - before) * 1000)
        assert len(found) == len(processes)
    return spent


def main() -> None:
    """Measure with and without control groups, then the most expensive part alone."""
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        names = [QualifiedName(f"s{number}") for number in range(SERVERS)]
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
            costs = {"without groups": cost(usage.Meter(_NoGroups(base), base), processes)}
            for name, child in children.items():
                groups.hold(name, child.pid)
            costs["with groups"] = cost(usage.Meter(groups, base), processes)
            for what, spent in costs.items():
                first, later = f"{spent[0]:.0f} ms", f"{median(spent[2:]):.1f} ms"
                print(f"{what}: first {first}, then {later} for {SERVERS} servers")
        finally:
            for child in children.values():
                os.killpg(child.pid, 9)
                child.wait()
            time.sleep(0.5)
            for name in names:
                groups.remove(name)
        before = time.process_time()
        usage._proportional([os.getpid()] * 100)  # noqa: SLF001
        spent_on_one = (time.process_time() - before) * 1000 / 100
        print(f"shared memory of one Python process: {spent_on_one:.2f} ms")


if __name__ == "__main__":
    main()

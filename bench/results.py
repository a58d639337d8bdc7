"""The results of one run, as plain data for JSON, without the machine's name and paths."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from progress import BenchError

Results = dict[str, Any]
FORK: Final = "labkeeper_fork"
EXEC: Final = "labkeeper_exec"
LAB: Final = "jupyter_lab"
HUB: Final = "jupyterhub"


def begin(versions: Mapping[str, Any], options: Mapping[str, Any]) -> Results:
    """Return the results of a run that has not measured anything yet."""
    return {
        "schema": 1,
        "when": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "kernel": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "busy_percent_before": psutil.cpu_percent(1.0),
        },
        "packages": dict(versions),
        "options": dict(options),
        "contenders": {},
        "skipped": {},
        "measurements": {},
    }


def resume(path: Path, begun: Results) -> Results:
    """Return the results of an earlier run, to be continued by the one that has just begun.

    Raises BenchError if there is none, or if machine, packages or options differ.
    """
    if not path.exists():
        raise BenchError(f"there is no run to resume: {path.name} does not exist")
    earlier = load(path)
    busy = "busy_percent_before"
    same_machine = begun["machine"] | {busy: earlier["machine"][busy]}
    expected = begun | {"machine": same_machine}
    for what in ("schema", "machine", "packages", "options"):
        if earlier[what] != expected[what]:
            raise BenchError(f"cannot resume {path.name}: it has other {what}: {earlier[what]}")
    return earlier | {"resumed": [*earlier.get("resumed", []), begun["when"]]}


def ours(results: Results) -> str:
    """Return the key of labkeeper: of its default mode, if that took part."""
    return next((key for key in (FORK, EXEC) if key in results["contenders"]), FORK)


def save(results: Results, path: Path) -> None:
    """Write the results, replacing the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(_rounded(results), indent=1) + "\n")
    new.replace(path)


def load(path: Path) -> Results:
    """Read the results of an earlier run."""
    return dict(json.loads(path.read_text()))


def _rounded(value: Any) -> Any:
    """Round to tens of microseconds; anything finer is noise."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value

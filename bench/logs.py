"""Measure the cost of removing secrets from a log."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from environments import Environments
from progress import BenchError, say


def scrub(environments: Environments) -> dict[str, Any]:
    """Run `scrubber.py` in the environment of the measured labkeeper; return its results."""
    say("labkeeper: removing secrets from log lines")
    program = str(Path(__file__).with_name("scrubber.py"))
    # -I, so that neither modules of the bench nor PYTHONPATH shadow what is installed there.
    command = [str(environments.lab / "bin/python"), "-I", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"cannot time the removal of secrets:\n{done.stderr}")
    return dict(json.loads(done.stdout))

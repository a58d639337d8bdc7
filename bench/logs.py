"""What it costs to take secrets out of the lines of a log."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from environments import Environments
from progress import BenchError, say


def scrub(environments: Environments) -> dict[str, Any]:
    """Time it with the labkeeper that is measured, which the bench itself may lack."""
    say("labkeeper: taking secrets out of lines of a log")
    program = Path(__file__).with_name("scrubber.py")
    # Isolated (-I): neither modules of the bench nor PYTHONPATH come before what is installed there.
    command = [environments.lab / "bin/python", "-I", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"cannot time the rule for secrets:\n{done.stderr}")
    return dict(json.loads(done.stdout))

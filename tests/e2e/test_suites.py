"""What other people's test suites say of a forked server, they say of a plain `jupyter lab`, too."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import httpx
import pytest

from harness import HOLD_PORTS, PATIENCE, forked, free_port, until

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labkeeper" / "suites"


@dataclass(frozen=True)
class Suite:
    """Tests of others: where they are in a source distribution, and how many of them at least speak to a server of ours."""

    lock: Path
    """Hashed requirements that pin it."""
    files: tuple[str, ...]
    least: int
    options: tuple[str, ...] = ()


SUITES = {
    # The HTTP API of the core that every Jupyter server has, in the version that is installed. Left out are files whose tests all
    # configure, patch or inspect a server in their own process (auth, base, extension, gateway), and those that need pandoc.
    "jupyter-server": Suite(
        ROOT / "requirements" / "dev.lock",
        (
            *(
                f"tests/services/{part}/test_api.py"
                for part in ("api", "config", "contents", "kernels", "kernelspecs")
            ),
            *(f"tests/services/{part}/test_api.py" for part in ("nbconvert", "sessions")),
            "tests/services/kernels/test_restart_error.py",
            *("tests/test_files.py", "tests/test_terminal.py", "tests/test_view.py"),
        ),
        least=190,
    ),
    # Kernels by websocket, as a program uses them. Its tests wait most of the time, for a client that is slow to close.
    "jupyter-kernel-client": Suite(
        ROOT / "requirements" / "suites.lock",
        ("jupyter_kernel_client/tests/test_client.py",),
        least=10,
        options=("-n", "4"),
    ),
}


# Fetched once, and pinned by the locks


def pinned(name):
    """Return a requirement as its lock has it, with the hashes."""
    found = re.search(
        rf"^{name}==(?:[^\n]*\\\n)+[^\n]*", SUITES[name].lock.read_text(), re.MULTILINE
    )
    return found[0]


def source_of(name):
    """Return the source distribution of a suite; skip the test where it cannot be downloaded."""
    requirement = pinned(name)
    hashes = set(re.findall(r"sha256:([0-9a-f]{64})", requirement))
    CACHE.mkdir(parents=True, exist_ok=True)
    for path in CACHE.glob("*.tar.gz"):
        if hashlib.sha256(path.read_bytes()).hexdigest() in hashes:
            return path
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        wanted = Path(place) / "requirements.txt"
        wanted.write_text(requirement)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--retries",
            "1",
        ]
        # Its metadata are read by the build backend that is installed; else an environment would be made for that.
        which = [
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--require-hashes",
            "-r",
            wanted,
            "-d",
            place,
        ]
        done = subprocess.run(
            [*pip, *which], capture_output=True, text=True, timeout=4 * PATIENCE, check=False
        )
        assert "DO NOT MATCH" not in done.stderr, done.stderr
        if done.returncode:
            pytest.skip(f"needs {name} from PyPI: {done.stderr.strip()[-300:]}")
        (path,) = Path(place).glob("*.tar.gz")
        return path.rename(CACHE / path.name)


@pytest.fixture
def source(name, tmp_path):
    """A suite, unpacked for this run."""
    archive = source_of(name)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz")


# Servers to ask


def directories(base):
    """Make what a server is to have for itself, and return the variables that say so."""
    for place in ("root", "data", "config"):
        (base / place).mkdir(parents=True)
    return {"JUPYTER_DATA_DIR": str(base / "data"), "JUPYTER_CONFIG_DIR": str(base / "config")}


def asked(base, url, token):
    """Return what the plugin has to know of a server."""
    return {
        "url": url,
        "token": token,
        "root_dir": str(base / "root"),
        "data_dir": str(base / "data"),
    }


@contextlib.contextmanager
def plain_lab(base):
    """Run `jupyter lab` as a user does, on the interpreter that the keeper's servers have."""
    port, token = free_port(), uuid.uuid4().hex
    variables = directories(base)
    (base / "config" / "jupyter_server_config.py").write_text(HOLD_PORTS)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LABKEEPER_", "PYTEST_", "JUPYTER_"))
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--allow-root",
        "--no-browser",
        "--ServerApp.port_retries=0",
    ]
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--port={port}", f"--ServerApp.root_dir={base / 'root'}"],
            env=clean
            | variables
            | {"HOME": str(base), "JUPYTER_RUNTIME_DIR": str(base / "run"), "JUPYTER_TOKEN": token},
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}/"

    def answers():
        assert process.poll() is None, (base / "log").read_text()
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}api", trust_env=False).status_code == 200
        return False

    try:
        until(answers, what="jupyter lab")
        yield asked(base, url, token)
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture
def servers(keeper, tmp_path):
    """A plain server, and a forked one of ours."""
    plain, ours = tmp_path / "plain", keeper.notebook_dir / "suite"
    plain.mkdir()
    with plain_lab(plain) as beside:
        server = forked(keeper, env=directories(ours), root_dir=str(ours / "root"))
        yield {"forked": asked(ours, server["url"], server["token"]), "plain": beside}


# Run, and compared


def run(suite, source, servers, tests, reports):
    """Run tests of a suite against each of the servers at once; return what became of each test there, and what pytest said."""
    plugins = ["-p", "outside", "-p", "no:randomly", "-p", "no:cacheprovider"]
    options = ["-c", os.devnull, "--rootdir", ".", "--noconftest", *suite.options]
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "LABKEEPER_"))
    }
    ours = {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{source}"}
    running = {}
    # Their temporary files are removed with this directory. Its path is short because they create Unix sockets in it.
    with tempfile.TemporaryDirectory() as scratch:
        for side, server in servers.items():
            command = [
                sys.executable,
                "-m",
                "pytest",
                *plugins,
                *options,
                "--junitxml",
                reports / f"{side}.xml",
                *tests,
            ]
            with (reports / f"{side}.log").open("wb") as log:
                env = clean | ours | {"SUITE_SERVER": json.dumps(server), "TMPDIR": scratch}
                running[side] = subprocess.Popen(
                    command, cwd=source, env=env, stdout=log, stderr=log
                )
        for child in running.values():
            child.wait()
    said = "\n".join((reports / f"{side}.log").read_text() for side in servers)
    assert all((reports / f"{side}.xml").exists() for side in servers), said
    return [outcomes(reports / f"{side}.xml") for side in servers], said


def outcomes(report):
    """Return what became of each test: passed, failure, error or skipped."""
    kinds = ("failure", "error", "skipped")
    return {
        f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}": next(
            (kind for kind in kinds if case.find(kind) is not None), "passed"
        )
        for case in ET.parse(report).iter("testcase")
    }


@pytest.mark.suites
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SUITES)
def test_suites_of_others_find_a_forked_server_as_they_find_a_plain_one(
    name, source, servers, tmp_path
):
    suite = SUITES[name]
    tests, first = suite.files, None
    # Some of these tests have a limit of time that a busy machine does not keep: a difference counts when it is there again.
    for attempt in range(3):
        reports = tmp_path / str(attempt)
        reports.mkdir()
        (ours, theirs), said = run(suite, source, servers, tests, reports)
        first = first or ours
        different = [test for test in ours | theirs if ours.get(test) != theirs.get(test)]
        if not different:
            break
        tests = different
    assert not different, (
        f"forked and plain: { {test: (ours.get(test), theirs.get(test)) for test in different} }\n{said}"
    )
    passed = [test for test, outcome in first.items() if outcome == "passed"]
    assert len(passed) >= suite.least, said
    failed = [test for test, outcome in first.items() if outcome in {"failure", "error"}]
    logging.getLogger(__name__).info(
        "%s: %d pass, and these fail on both: %s", name, len(passed), failed
    )

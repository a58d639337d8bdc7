"""Third-party test suites have the same results on a forked server as on a plain `jupyter lab`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from harness import HOLD_PORTS, PATIENCE, KeeperProcess, forked, free_port, until
from suites import NAMED_FILES, outcomes, unpack

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Suite:
    """Tests in a source distribution, and how many of them must at least pass."""

    lock: Path
    """Hashed requirements with the pinned version."""
    files: tuple[str, ...]
    min_passed: int
    options: tuple[str, ...] = ()


SUITES = {
    # The HTTP API that every Jupyter server has, in the installed version. This leaves out files
    # that need pandoc, and files whose tests all configure, patch or inspect a server in their
    # own process (auth, base, extension, gateway).
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
        min_passed=190,
    ),
    # Kernels over websockets, as programs use them.
    # Its tests mostly wait for a client that is slow to close.
    "jupyter-kernel-client": Suite(
        ROOT / "requirements" / "suites.lock",
        ("jupyter_kernel_client/tests/test_client.py",),
        min_passed=10,
        options=("-n", "4"),
    ),
}


@pytest.fixture
def source(name, tmp_path):
    """A suite, unpacked for one test."""
    return unpack(name, SUITES[name].lock, tmp_path)


# Servers under test


def directories(base):
    """Create a server's own directories, and return the variables that point to them."""
    for place in ("root", "data", "config"):
        (base / place).mkdir(parents=True)
    return {"JUPYTER_DATA_DIR": str(base / "data"), "JUPYTER_CONFIG_DIR": str(base / "config")}


def server_facts(base, url, token):
    """Return what the pytest plugin needs to know about a server."""
    return {
        "url": url,
        "token": token,
        "root_dir": str(base / "root"),
        "data_dir": str(base / "data"),
    }


@contextlib.contextmanager
def plain_lab(base):
    """Run `jupyter lab` as a user does, on the interpreter of the keeper's servers."""
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
        until(answers, what="jupyter lab to respond")
        yield server_facts(base, url, token)
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def _with_ports(tmp_path_factory):
    running = KeeperProcess(tmp_path_factory.mktemp("suites") / "keeper", lab_address="port")
    yield running.start_to_fork()
    running.close()


@pytest.fixture
def keeper(_with_ports):
    """A keeper whose servers have no path, as plain ones."""
    yield _with_ports
    _with_ports.clear()


@pytest.fixture
def servers(keeper, tmp_path):
    """A plain server, and a forked server of the keeper."""
    plain, ours = tmp_path / "plain", keeper.notebook_dir / "suite"
    plain.mkdir()
    with plain_lab(plain) as beside:
        server = forked(keeper, env=directories(ours), root_dir=str(ours / "root"))
        yield {"forked": server_facts(ours, server["url"], server["token"]), "plain": beside}


# Runs and their comparison


def run(suite, source, servers, tests, reports):
    """Run tests of a suite against all servers at once; return their outcomes and the output."""
    plugins = ["-p", "outside", "-p", "no:randomly", "-p", "no:cacheprovider"]
    options = ["-c", os.devnull, "--rootdir", ".", "--noconftest", *NAMED_FILES, *suite.options]
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "LABKEEPER_"))
    }
    ours = {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{source}"}
    running = {}
    # Temporary files are removed with this directory.
    # Its path is short, because the tests create Unix sockets in it.
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
    output = "\n".join((reports / f"{side}.log").read_text() for side in servers)
    assert all((reports / f"{side}.xml").exists() for side in servers), output
    return [outcomes(reports / f"{side}.xml") for side in servers], output


@pytest.mark.suites
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SUITES)
def test_third_party_suites_have_equal_results_on_forked_and_plain_servers(
    name, source, servers, tmp_path
):
    suite = SUITES[name]
    tests, first = suite.files, None
    # Some tests have a timeout that a busy machine does not meet:
    # only a difference that occurs three times counts.
    for attempt in range(3):
        reports = tmp_path / str(attempt)
        reports.mkdir()
        (ours, theirs), output = run(suite, source, servers, tests, reports)
        first = first or ours
        different = [test for test in ours | theirs if ours.get(test) != theirs.get(test)]
        if not different:
            break
        tests = different
    assert not different, (
        "outcomes differ, as (forked, plain):"
        f" { {test: (ours.get(test), theirs.get(test)) for test in different} }\n"
        f"{output}"
    )
    passed = [test for test, outcome in first.items() if outcome == "passed"]
    assert len(passed) >= suite.min_passed, output
    failed = [test for test, outcome in first.items() if outcome in {"failure", "error"}]
    logging.getLogger(__name__).info(
        "%s: %d pass, and these fail on both: %s", name, len(passed), failed
    )

"""ipykernel's own tests have the same results on forked kernels as on executed ones."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from environments import IPYKERNEL_TESTS, create
from harness import kill_all, processes_marked, until
from suites import NAMED_FILES, outcomes, unpack

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
SOURCES = Path(__file__).resolve().parents[2] / "src"
SIDES = {"jupyter": (), "ours": ("-p", "our_provisioner")}
"""By whose provisioner kernels are launched; with pytest's options for it."""
AS_THEY_ARE = (
    *("-p", "no:cacheprovider"),
    # pytest-asyncio warns that it is missing, and their configuration makes warnings errors.
    *("-o", "asyncio_default_fixture_loop_scope=function"),
    # Their own timeout of 30 seconds is meant for an otherwise idle machine.
    *("--timeout", "120"),
)
"""Options in addition to their own configuration."""
_log = logging.getLogger(__name__)
MIN_PASSED = 220
MIN_FORKED = 30
EXECUTED = "the environment variable TERM takes effect only when a program starts"
"""Why kernels are executed: once IPython's shell runs in a test, the variable is another one."""


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment with this ipykernel and what its tests need."""
    try:
        return create(IPYKERNEL_TESTS) / "bin" / "python"
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs packages from PyPI: {error}")


@pytest.fixture
def source(tmp_path):
    """Their tests and configuration, without their package: the installed one is tested."""
    return unpack("ipykernel", IPYKERNEL_TESTS[1], tmp_path, ("tests/", "pyproject.toml"))


class Run:
    """A run of their tests on one side."""

    def __init__(self, side, python, source, scratch, tests):
        self.side = side
        self.place = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=scratch))
        self.report, self.log = self.place / "report.xml", self.place / "log"
        foreign = ("PYTEST_", "LABKEEPER_", "JUPYTER_", "IPYTHON", "COVERAGE_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        ours = {
            # Their tests of graphical event loops are skipped, which hang without a display.
            "CI": "true",
            "JUPYTER_RUNTIME_DIR": str(self.place),
            "LABKEEPER_SERVER": str(self.place),
            # The first test that imports debugpy would set it for later kernels alone.
            "PYDEVD_USE_FRAME_EVAL": "NO",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (PLUGINS, SOURCES))),
            "SUITE_KERNELS": str(self.place),
            "TMPDIR": scratch,
        }
        plugins = ("-p", "held_ports", *SIDES[side])
        options = (*AS_THEY_ARE, *NAMED_FILES, "--junitxml", self.report)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "-m", "pytest", *plugins, *options, *tests],
                cwd=source,
                env=clean | ours,
                stdout=log,
                stderr=log,
            )

    def finish(self):
        """Wait for the end, also of all that it has started; return the outcomes."""
        self.process.wait()
        assert self.report.exists(), self.log.read_text()
        until(lambda: not self.left(), what=lambda: f"kernels and zygotes to end: {self.left()}")
        kill_all(processes_marked(self.place))
        return outcomes(self.report)

    def left(self):
        """Return what has not ended.

        An adapter of debugpy waits forever for a kernel that ends before it has connected, however
        it was launched. The debugger's tests end kernels at once.
        """
        return [
            process
            for process in processes_marked(self.place)
            if not any(part.endswith("/debugpy/adapter") for part in _command(process))
        ]

    @property
    def launches(self):
        """Return how many kernels were launched in each way, as pairs of way and reason."""
        path = self.place / "launches"
        # Tests that are repeated need not start kernels.
        launches = path.read_text().splitlines() if path.exists() else []
        return collections.Counter(
            (each["launched_by"], each["exec_reason"]) for each in map(json.loads, launches)
        )


def _command(process):
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def run_both(python, source, scratch, tests):
    """Run tests on both sides at once; return their outcomes, the launches and the output."""
    runs = [Run(side, python, source, scratch, tests) for side in SIDES]
    try:
        theirs, ours = (run.finish() for run in runs)
    finally:
        for run in runs:
            run.process.kill()
            run.process.wait()
    return theirs, ours, runs[1].launches, "\n".join(run.log.read_text() for run in runs)


@pytest.mark.suites
@pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")
@pytest.mark.timeout(1200)
def test_ipykernels_own_tests_have_equal_results_with_our_provisioner(python, source):
    theirs, ours, tests, launches = {}, {}, (), collections.Counter()
    # The path is short, because the tests create Unix sockets below it.
    with tempfile.TemporaryDirectory(prefix="ik-") as scratch:
        # Some assert durations, which a busy machine does not meet: only what occurs three times
        # counts.
        for _ in range(3):
            *both, launched, output = run_both(python, source, scratch, tests)
            theirs |= both[0]
            ours |= both[1]
            launches += launched
            tests = [*different(theirs, ours)]
            _log.info("kernels with our provisioner: %s", launched)
            if not tests:
                break
            _log.warning("%s, as (Jupyter's, ours)\n%s", different(theirs, ours), output)
    assert not different(theirs, ours), output
    assert list(ours.values()).count("passed") >= MIN_PASSED, output
    assert launches["fork", None] >= MIN_FORKED, launches
    assert launches.keys() <= {("fork", None), ("exec", EXECUTED)}


def different(theirs, ours):
    """Return outcomes of the tests that failed on a side, or are missing or skipped on one."""
    both = {test: (theirs.get(test), ours.get(test)) for test in sorted(theirs | ours)}
    return {
        test: pair
        for test, pair in both.items()
        if pair not in {("passed", "passed"), ("skipped", "skipped")}
    }

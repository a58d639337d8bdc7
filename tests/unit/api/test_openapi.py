"""The API keeps what its OpenAPI document says, and takes no harm from what it does not: schemathesis against a real keeper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import KeeperProcess
from labkeeper.api.routes import ROUTES

SEED = os.environ["SEED"]
"""Another one makes other requests, and other sequences of them."""
REAL_STARTS = 5
PHASES = {"examples", "coverage", "fuzzing", "stateful"}


@pytest.fixture
def keeper(tmp_path):
    """Few servers, so that most starts are refused with 429, and those that are not are soon ready or given up."""
    keeper = KeeperProcess(
        tmp_path,
        launch_by="fork",
        max_servers=8,
        start_timeout=20,
        max_request_rate=0,
        stop_grace=3,
    )
    yield keeper.start()
    keeper.close()


@pytest.mark.fuzz
@pytest.mark.timeout(960)
def test_the_api_keeps_what_its_document_says(keeper, tmp_path):
    """All checks on every route, links from answer to request too; schemathesis.toml says what is expected otherwise, and why."""
    report = tmp_path / "report.json"
    configuration = Path(__file__).parent / "schemathesis.toml"
    ended = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--config-file", configuration, "run", f"{keeper.url}/api/openapi.json",
         "--seed", SEED, "--generation-database", "none", "--no-color",
         "--report", "json", "--report-json-path", report],
        env=os.environ | {"LABKEEPER_TOKEN": keeper.token},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, (
        ended.stdout + ended.stderr
    )  # The seed is in it, and each request as a line for curl.
    told = json.loads(report.read_text())
    assert told["operations"]["tested"] == len(ROUTES)
    assert {
        name for name, phase in told["phases"].items() if phase["status"] == "success"
    } == PHASES
    log = keeper.log.read_text()
    assert "unexpected error" not in log
    # Else it would have been proven of refusals alone.
    assert log.count("starting -> running") >= REAL_STARTS
    assert keeper.http.get("/readyz").status_code == 200

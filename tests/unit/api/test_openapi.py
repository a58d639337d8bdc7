"""Schemathesis against a real keeper: the API conforms to its OpenAPI document."""

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
"""Another seed makes other requests and sequences."""
REAL_STARTS = 5
PHASES = {"examples", "coverage", "fuzzing", "stateful"}


@pytest.fixture
def keeper(tmp_path):
    """A keeper with few servers: most starts are refused with 429, the others end soon."""
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
def test_the_api_conforms_to_its_openapi_document(keeper, tmp_path):
    """Every check on every route, with stateful sequences; exceptions are in schemathesis.toml."""
    report = tmp_path / "report.json"
    configuration = Path(__file__).parent / "schemathesis.toml"
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            configuration,
            "run",
            f"{keeper.url}/api/openapi.json",
            "--seed",
            SEED,
            "--generation-database",
            "none",
            "--no-color",
            "--report",
            "json",
            "--report-json-path",
            report,
        ],
        env=os.environ | {"LABKEEPER_TOKEN": keeper.token},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    # The output has the seed, and a curl command for each failed request.
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(report.read_text())
    assert results["operations"]["tested"] == len(ROUTES)
    assert {
        name for name, phase in results["phases"].items() if phase["status"] == "success"
    } == PHASES
    log = keeper.log.read_text()
    assert "unexpected error" not in log
    # Otherwise only refusals would have been checked.
    assert log.count("starting -> running") >= REAL_STARTS
    assert keeper.http.get("/readyz").status_code == 200

"""The page about containers matches the image."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest

from engine import ROOT, docker
from harness import PATIENCE

PAGE = ROOT / "docs/how-to/run-in-a-container.md"


@pytest.mark.skipif(
    os.environ["TEST_DOCKER"] != "own",
    reason="needs its own Docker Engine, because names and ports are fixed",
)
@pytest.mark.timeout(300)
def test_container_tour_works_as_documented(tmp_path):
    script = re.search(r"<!-- tour: docker -->\n\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    try:
        done = subprocess.run(
            ["sh", "-eu"],
            input=script,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        server = json.loads(next(line for line in done.stdout.splitlines() if '"lab_url"' in line))
        assert (server["state"], server["port"], server["root_dir"]) == (
            "running",
            8888,
            "/notebooks",
        )
        assert server["lab_url"].startswith("http://127.0.0.1:8888/lab?token=")
        assert json.loads(docker("inspect", "mytest").stdout)[0]["State"]["ExitCode"] == 0
        assert "no server is left" in docker("logs", "mytest").stderr
    finally:
        docker("rm", "-f", "-v", "mytest", check=False)


def test_documented_settings_match_the_dockerfile():
    recipe = dict(
        re.findall(r"^ +(LABKEEPER_\w+)=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    )
    rows = re.findall(r"^\| (`LABKEEPER_.*?) \| (.*?) \|$", PAGE.read_text(), re.MULTILINE)
    documented = {}
    for row in rows:
        names, values = (re.findall(r"`(.*?)`", cell) for cell in row)
        documented |= dict(
            zip(names, values * len(names) if len(values) == 1 else values, strict=True)
        )
    assert documented == recipe

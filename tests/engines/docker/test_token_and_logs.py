"""How callers get the token, and what the container logs."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from harness import run_cell, start_kernel, until

CONFIGURED_TOKEN = "a-token-that-was-given"


def test_token_is_available_by_docker_exec_and_not_in_the_logs(
    make_container,
):
    container = make_container().start()
    server = container.server()
    assert len(container.token) == 43
    logs = container.logs()
    assert container.token not in logs
    assert server["token"] not in logs
    assert container.exec(
        "stat", "-c", "%a %U", "/var/lib/labkeeper/state/token"
    ).stdout.split() == ["600", "labkeeper"]
    listed = container.exec("labkeeper", "ls").stdout
    assert listed.splitlines()[1].split()[:2] == ["default", "running"]


@pytest.mark.parametrize("way", ["environment", "file"])
def test_token_can_be_set(make_container, tmp_path, way):
    if way == "environment":
        container = make_container(environment={"LABKEEPER_TOKEN": CONFIGURED_TOKEN})
    else:
        (tmp_path / "secret").write_text(CONFIGURED_TOKEN + "\n")
        (tmp_path / "secret").chmod(0o644)
        for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
            parent.chmod(0o755)
        mount = ("-v", f"{tmp_path}/secret:/run/secrets/labkeeper:ro")
        container = make_container(
            *mount, environment={"LABKEEPER_TOKEN_FILE": "/run/secrets/labkeeper"}
        )
    container.start()
    assert container.token == CONFIGURED_TOKEN
    answer = httpx.get(
        f"{container.http.base_url}/api/servers",
        headers={"Authorization": f"Bearer {CONFIGURED_TOKEN}"},
        trust_env=False,
    )
    assert answer.json() == {"servers": [], "next": None}
    # Notebooks do not inherit it.
    kernel = start_kernel(server := container.server())
    assert (
        run_cell(
            server,
            kernel,
            f"import os; [n for n, v in os.environ.items() if {CONFIGURED_TOKEN!r} in v"
            " or 'LABKEEPER_T' in n]",
        )
        == "[]"
    )
    assert CONFIGURED_TOKEN not in container.logs()


@pytest.mark.parametrize("form", ["console", "json"])
def test_server_log_lines_are_labelled_and_tracebacks_are_complete(make_container, form):
    container = make_container(environment={"LABKEEPER_LOG_FORMAT": form}).start()
    server = container.server()
    # Jupyter's handler fails on this body, with a traceback of many lines.
    failed_request = httpx.put(
        f"{server['url']}api/contents/x",
        headers={"Authorization": f"token {server['token']}"},
        json={"type": "notebook", "content": "no notebook"},
        trust_env=False,
    )
    assert failed_request.status_code == 500
    until(lambda: "Traceback" in container.logs(), what="the traceback in the container's log")
    lines = container.logs().splitlines()
    if form == "json":
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        trace = next(entry for entry in entries if "Traceback" in entry.get("exception", ""))
        assert (trace["logger"], trace["server"]) == ("jupyter", "default")
        assert trace["level"] in {"warning", "error"}
        assert re.search(r"\w+Error|Exception", trace["exception"].splitlines()[-1])
        assert {"labkeeper.servers", "jupyter"} <= {entry["logger"] for entry in entries}
    else:
        assert any(
            "[labkeeper.servers]" in line and "starting -> running" in line for line in lines
        )
        assert any(
            "[jupyter]" in line and "server=default" in line and "is running at" in line
            for line in lines
        )
        begin = next(number for number, line in enumerate(lines) if "Traceback" in line)
        assert any(line.strip().startswith("File ") for line in lines[begin + 1 : begin + 4])

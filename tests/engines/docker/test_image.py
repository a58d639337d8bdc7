"""The image: its contents, its metadata, and images derived from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import httpx
import pytest

from engine import FORK, IMAGE, ROOT, docker
from harness import run_cell, start_kernel, until
from labkeeper.settings.location import PREFIX
from labkeeper.settings.model import Settings

MAX_IMAGE_MEGABYTES = 500
"""Maximum size of the image including its base; the documentation states the size."""


@pytest.fixture(scope="module")
def config():
    return json.loads(docker("inspect", IMAGE).stdout)[0]


def test_image_metadata(config):
    labels = config["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "jupyter-server"
    assert labels["org.opencontainers.image.licenses"] == "BSD-3-Clause"
    assert set(config["Config"]["ExposedPorts"]) == {"80/tcp", "8888/tcp"}
    assert config["Config"]["User"] == "labkeeper"
    assert config["Size"] < MAX_IMAGE_MEGABYTES * 10**6


def test_environment_of_the_image_has_valid_settings_only(config):
    variables = dict(entry.split("=", 1) for entry in config["Config"]["Env"])
    ours = {name: value for name, value in variables.items() if name.startswith(PREFIX)}
    assert {name.removeprefix(PREFIX).lower() for name in ours} <= set(Settings.model_fields)
    assert ours["LABKEEPER_NOTEBOOK_DIR"] == "/notebooks"
    assert (ours["LABKEEPER_PORT"], ours["LABKEEPER_LAB_PORT"]) == ("80", "8888")
    assert "LABKEEPER_DEBUG" not in ours
    assert "LABKEEPER_TOKEN" not in ours


def test_image_contains_no_build_files_or_certificates(container):
    left = container.exec(
        "sh",
        "-c",
        "ls -d /build /root/.cache /var/lib/labkeeper/.cache /opt/*/share/jupyter/lab/static/*.map",
        check=False,
    )
    assert left.stdout == ""
    for stage in ("jupyter-server", "jupyter-gateway"):
        assert (
            "BEGIN CERTIFICATE"
            not in docker("history", "--no-trunc", f"{stage}:{IMAGE.partition(':')[2]}").stdout
        )


def test_modules_that_servers_load_are_compiled(container):
    missing = container.python(
        "import importlib.util, pathlib, sys\n"
        "import jupyterlab.labapp, jupyter_server.serverapp, ipykernel.kernelapp\n"
        "files = [m.__spec__ for m in list(sys.modules.values())"
        " if getattr(m, '__spec__', None) and m.__spec__.origin]\n"
        "print([s.origin for s in files if s.origin.endswith('.py') and s.name != '__main__'"
        " and not pathlib.Path(importlib.util.cache_from_source(s.origin)).exists()])"
    )
    assert missing.strip() == "[]"


def test_healthcheck_reports_healthy_and_unhealthy(make_container):
    container = make_container(
        "--health-interval", "1s", "--health-start-period", "0s", "--health-retries", "2"
    ).start()
    until(
        lambda: container.state()["Health"]["Status"] == "healthy",
        what="the container to be healthy",
    )
    # The process of the keeper lives, but does not respond.
    keeper = next(
        pid
        for pid, (_, command) in container.processes().items()
        if command.endswith("labkeeper serve") and pid != 1
    )
    container.python(f"import os, signal; os.kill({keeper}, signal.SIGSTOP)")
    until(
        lambda: container.state()["Health"]["Status"] == "unhealthy",
        what="the container to be unhealthy",
    )


def test_jupyter_configuration_of_the_image_is_used(make_container, notebooks):
    """Without it, files deleted in the Lab stay in a hidden directory beside the notebooks."""
    owner = notebooks.stat().st_uid
    container = make_container("--user", f"{owner}:{owner}", notebooks=notebooks).start()
    server = container.server()
    kernel = start_kernel(server)
    run_cell(server, kernel, "open('unwanted.txt', 'w').close()")
    gone = httpx.delete(
        f"{server['url']}api/contents/unwanted.txt",
        headers={"Authorization": f"token {server['token']}"},
        trust_env=False,
    )
    assert gone.status_code == 204, gone.text
    # Jupyter's own checkpoints remain beside the notebooks.
    assert [file.name for file in notebooks.iterdir() if file.name != ".ipynb_checkpoints"] == []
    paths = json.loads(container.exec("jupyter", "--paths", "--json").stdout)["config"]
    assert "/opt/jupyter/etc/jupyter" in paths


def test_extensions_in_a_derived_image_are_preloaded(make_container, tmp_path):
    page = (ROOT / "docs/how-to/run-in-a-container.md").read_text()
    base, install = re.search(r"^```dockerfile\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[
        1
    ].splitlines()
    wheel = built_extension(tmp_path)
    recipe = [
        base.replace("jupyter-server", IMAGE),
        f"COPY {wheel.name} /tmp/",
        re.sub("numpy.*", f"/tmp/{wheel.name}", install),
    ]
    (tmp_path / "Dockerfile").write_text("\n".join(recipe))
    image = "labkeeper-test-extended"
    docker("build", "-q", "-t", image, tmp_path)
    try:
        container = make_container(image=image, environment=FORK).start()
        container.forked()
        assert "the extension is loaded" in container.http.get("/api/servers/default/logs").text
        # The first server may have waited for the fork server.
        container.delete()
        assert container.server()["launched_by"] == "fork"
        log = container.http.get("/api/servers/default/logs").text
        assert "the extension is loaded, imported before the fork" in log
    finally:
        docker("rmi", "-f", image)


def built_extension(directory):
    """Build a wheel with a server extension that logs which process has imported it."""
    package = directory / "package"
    (package / "telling_extension").mkdir(parents=True)
    (package / "telling_extension/__init__.py").write_text(
        "import os\n"
        "imported_by = os.getpid()\n"
        "def _jupyter_server_extension_points(): return [{'module': 'telling_extension'}]\n"
        "def _load_jupyter_server_extension(app):\n"
        "    moment = 'at its start' if os.getpid() == imported_by else 'before the fork'\n"
        "    app.log.info('the extension is loaded, imported %s', moment)\n"
    )
    (package / "enabled.json").write_text(
        json.dumps({"ServerApp": {"jpserver_extensions": {"telling_extension": True}}})
    )
    (package / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['hatchling']\nbuild-backend = 'hatchling.build'\n"
        "[project]\nname = 'telling-extension'\nversion = '1'\n"
        "[tool.hatch.build.targets.wheel.shared-data]\n"
        "'enabled.json' = 'etc/jupyter/jupyter_server_config.d/telling_extension.json'\n"
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(directory),
        str(package),
    ]
    subprocess.run(command, check=True)
    return next(directory.glob("*.whl"))

"""A second Docker Engine with user namespace remapping."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from engine import IMAGE
from harness import PATIENCE, until

pytestmark = pytest.mark.skipif(
    os.environ["TEST_DOCKER"] != "own", reason="needs root to start its own Docker Engine"
)


@pytest.fixture(scope="module")
def docker():
    """Docker's CLI for such an engine, which has the image under test but no network."""
    place = Path(tempfile.mkdtemp(prefix="labkeeper-docker-", dir="/var/tmp"))
    # The remapped users have to traverse the directory.
    place.chmod(0o711)
    socket = f"unix://{place}/docker.sock"
    # Docker creates the user `dockremap`, with its own user ids, if it does not exist.
    # The engine runs in its own network namespace, since it would remove the bridge of another one.
    options = ["--userns-remap=default", "--bridge=none", "--iptables=false", "-H", socket]
    places = ["--data-root", f"{place}/data", "--exec-root", f"{place}/exec", "-p", f"{place}/pid"]
    with (place / "log").open("wb") as log:
        engine = subprocess.Popen(
            ["unshare", "--net", "dockerd", *options, *places],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def docker(*arguments, check=True):
        done = subprocess.run(
            ["docker", "-H", socket, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert not check or done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout + done.stderr

    try:
        until(lambda: docker("ps", "-q", check=False) == "", what="the Docker Engine to respond")
        with subprocess.Popen(["docker", "save", IMAGE], stdout=subprocess.PIPE) as saved:
            subprocess.run(
                ["docker", "-H", socket, "load", "-q"],
                stdin=saved.stdout,
                stdout=subprocess.DEVNULL,
                check=True,
            )
        yield docker
    finally:
        engine.terminate()
        engine.wait(PATIENCE)
        shutil.rmtree(place)


@pytest.mark.timeout(300)
def test_container_works_with_user_namespace_remapping(docker, tmp_path):
    first = int(
        next(
            line
            for line in Path("/etc/subuid").read_text().splitlines()
            if line.startswith("dockremap:")
        ).split(":")[1]
    )
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    os.chown(notebooks, first + 1000, first + 1000)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    docker("run", "-d", "--name", "mapped", "-v", f"{notebooks}:/notebooks", IMAGE)
    until(
        lambda: "/lab?token=" in docker("exec", "mapped", "labkeeper", "start", check=False),
        what="a server to start",
    )
    docker("exec", "mapped", "touch", "/notebooks/made")
    assert (notebooks / "made").stat().st_uid == first + 1000
    state = json.loads(docker("inspect", "mapped"))[0]["State"]
    uids = next(
        line
        for line in Path(f"/proc/{state['Pid']}/status").read_text().splitlines()
        if line.startswith("Uid:")
    )
    assert uids.split()[1:] == [str(first + 1000)] * 4
    docker("stop", "mapped")
    assert json.loads(docker("inspect", "mapped"))[0]["State"]["ExitCode"] == 0
    assert "no server is left" in docker("logs", "mapped")
    docker("rm", "mapped")

"""A second engine whose containers live in a user namespace: root in there is nobody out here."""

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
    os.environ["TEST_DOCKER"] != "own", reason="needs to start an engine of its own, as root"
)


@pytest.fixture(scope="module")
def docker():
    """The command line of Docker on such an engine, which has the image under test and no network."""
    place = Path(tempfile.mkdtemp(prefix="labkeeper-docker-", dir="/var/tmp"))
    # The users of its containers have to pass through.
    place.chmod(0o711)
    socket = f"unix://{place}/docker.sock"
    # Docker makes the user `dockremap`, with user ids of its own, when there is none. In a network namespace of its own, since an
    # engine takes away the bridge of another one.
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
        until(lambda: docker("ps", "-q", check=False) == "", what="the engine")
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
def test_the_container_works_and_its_root_is_nobody_outside(docker, tmp_path):
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
        what="a server",
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

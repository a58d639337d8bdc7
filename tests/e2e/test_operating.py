"""The commands of "Operate it", as printed, on a real keeper."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness import PATIENCE, alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="chown --reference is GNU's")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "operate.md"


def commands(name):
    _, _, rest = PAGE.read_text().partition(f"<!-- operate: {name} -->\n")
    return re.search(r"```sh\n(.*?)^```$", rest, re.DOTALL | re.MULTILINE)[1]


def readable_by_others(directory):
    files = [path for path in directory.iterdir() if path.is_file()]
    return [path for path in files if path.stat().st_mode & 0o077]


@pytest.fixture
def run(tmp_path):
    def run(keeper, name):
        env = {
            "PATH": os.environ["PATH"],
            "STATE": str(keeper.state_dir),
            "BACKUP": str(tmp_path / "backups" / "today"),
        }
        return subprocess.run(
            ["sh", "-euc", commands(name)],
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )

    return run


@pytest.fixture
def keeper(make_keeper):
    return make_keeper().start()


def test_a_backup_of_a_running_keeper_is_restored_as_printed(keeper, run, tmp_path):
    made = keeper.http.post("/api/tokens", json={"name": "ci", "scope": "read"}).json()
    keeper.post(name="kept", labels={"team": "blue"})
    run(keeper, "back up")
    backup = tmp_path / "backups" / "today"
    assert {path.name for path in backup.iterdir()} >= {"labkeeper.sqlite", "token"}
    assert readable_by_others(backup) == []

    # Delete what is in the backup, and create a server that is not.
    keeper.delete("kept")
    keeper.http.delete("/api/tokens/ci")
    late = keeper.post(name="late").json()
    token = keeper.token
    # Its last changes are in the write-ahead log only.
    keeper.kill()
    assert (keeper.state_dir / "labkeeper.sqlite-wal").stat().st_size
    (keeper.state_dir / "token").unlink()
    run(keeper, "restore")
    keeper.start()

    assert keeper.token == token
    assert keeper.wait_for("running", "kept")["labels"] == {"team": "blue"}
    assert [server["name"] for server in keeper.http.get("/api/servers").json()["servers"]] == [
        "kept"
    ]
    # The next keeper has ended what the backup does not know.
    assert not alive(late["pid"])
    restored = {"Authorization": f"Bearer {made['token']}"}
    assert keeper.http.get("/api/me", headers=restored).status_code == 200
    assert readable_by_others(keeper.state_dir) == []

"""Containers that run systemd, with labkeeper installed as documented."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from engine import ROOT, docker
from harness import until

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "how-to" / "run-as-a-service.md"
SOURCE = ("LICENSE", "README.md", "deploy", "pyproject.toml", "src")
PATIENCE = 120


def documented_commands(name):
    """Return the commands of a part of the page."""
    found = re.search(
        rf"<!-- service: {name} -->\n+```sh\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    return found[1]


class Machine:
    """A container with systemd as process 1, and the capabilities of root that this needs."""

    def __init__(self, image):
        self.name = f"labkeeper-test-{uuid.uuid4().hex[:8]}"
        self.image = image

    def start_up(self):
        # SYS_ADMIN: systemd mounts its control groups.
        # SYS_PTRACE: a root keeper inspects processes of other users.
        rights = (
            "--cgroupns=private",
            "--cap-add=SYS_ADMIN",
            "--cap-add=SYS_PTRACE",
            "--tmpfs=/run:exec",
            "--tmpfs=/run/lock",
        )
        rights += ("--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined")
        docker("run", "-d", "--name", self.name, *rights, self.image)
        self.boot()

    def boot(self):
        until(self.booted, what=lambda: f"systemd to boot ({self.report()})")

    def booted(self):
        if docker("inspect", "-f", "{{.State.Running}}", self.name).stdout.strip() != "true":
            raise AssertionError(f"systemd has exited ({self.report()})")
        return self.run("systemctl is-system-running", check=False) in {"running", "degraded"}

    def report(self):
        """Return diagnostics of a failed boot."""
        diagnostics = (
            "systemctl is-system-running; systemctl list-jobs; systemctl --failed;"
            " journalctl --no-pager -n 100"
        )
        return [
            (done.stdout, done.stderr)
            for done in (
                docker("logs", self.name, check=False),
                docker("exec", self.name, "sh", "-c", diagnostics, check=False),
            )
        ]

    def reboot(self):
        """Restart systemd with an empty /run."""
        docker("restart", "-t", PATIENCE, self.name, timeout=2 * PATIENCE)
        self.boot()

    def close(self):
        docker("rm", "-f", "-v", self.name, check=False)

    def run(self, commands, *, check=True, timeout=PATIENCE):
        """Run commands as root, and return their output."""
        environment = "export LABKEEPER_STATE_DIR=/var/lib/labkeeper\n"
        done = docker(
            "exec", self.name, "bash", "-euc", environment + commands, check=False, timeout=timeout
        )
        assert not check or done.returncode == 0, (
            commands,
            done.stdout,
            done.stderr,
            self.journal(),
        )
        return done.stdout.strip()

    def follow(self, name, **options):
        """Run the commands of a part of the page."""
        return self.run(documented_commands(name), **options)

    def journal(self):
        return docker(
            "exec",
            self.name,
            "journalctl",
            "-u",
            "labkeeper",
            "--no-pager",
            "-n",
            "40",
            check=False,
        ).stdout

    # The service

    def service(self, *properties):
        """Return properties of the unit."""
        output = self.run(
            "systemctl show labkeeper" + "".join(f" -p {name}" for name in properties)
        )
        found = dict(line.split("=", 1) for line in output.splitlines())
        return [found[name] for name in properties]

    @property
    def keeper(self):
        """The keeper's pid."""
        return int(self.service("MainPID")[0])

    def wait(self, *, after=0):
        """Wait until a keeper is ready whose pid is not `after`."""

        def ready():
            pid = self.keeper
            return pid not in {0, after} and self.run(
                "curl -sf http://127.0.0.1:8000/readyz", check=False
            )

        until(ready, what="the keeper to be ready")

    def left(self):
        """Return the command lines of all processes of the service's user."""
        return self.run("ps -u labkeeper -o args=", check=False).splitlines()

    # Its servers

    def start(self, name="demo", options=""):
        self.run(f"labkeeper start {name} {options}")
        return self.server(name)

    def server(self, name="demo"):
        return json.loads(self.run(f"labkeeper show {name} --json"))

    def running(self, name="demo"):
        """Wait until a server is running."""

        def running():
            with suppress(AssertionError):
                server = self.server(name)
                return server if server["state"] == "running" else None

        return until(running, what=f"server '{name}' to run")

    def cell(self, code, name="demo"):
        """Run code in the server's kernel, and return its output."""
        runtime_dir = f"/run/labkeeper/{name}/jupyter"
        server = self.server(name)
        program = "/opt/labkeeper/bin/python /usr/local/libexec/cell.py"
        # Through the edge, which outlives keepers, too.
        url = f"http://127.0.0.1:8000{server['base_url']}"
        return self.run(f"{program} {url} {server['token']} {runtime_dir} '{code}'")


@pytest.fixture(scope="session")
def bare_image(tmp_path_factory):
    """An image with systemd and the source, but nothing installed."""
    context = tmp_path_factory.mktemp("context")
    for name in ("Dockerfile", "init", "cell.py"):
        shutil.copy2(HERE / name, context)
    for name in SOURCE:
        path = ROOT / name
        target = context / "source" / name
        if path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(path, target)
    certificates = context / "certificates"
    certificates.mkdir()
    # The image trusts the authorities of this machine, since a proxy may be on the way to PyPI.
    trusted = Path("/etc/ssl/certs/ca-certificates.crt")
    if trusted.exists():
        shutil.copy2(trusted, certificates / "test.crt")
    tag = f"labkeeper-test-systemd:{uuid.uuid4().hex[:8]}"
    docker(
        "build", "-q", "--build-arg", f"BASE={os.environ['BASE']}", "-t", tag, context, timeout=600
    )
    yield tag
    docker("rmi", "-f", tag, check=False)


@pytest.fixture(scope="session")
def installed_image(bare_image):
    """An image with labkeeper installed as documented, and its service stopped."""
    machine = Machine(bare_image)
    tag = bare_image + "-installed"
    try:
        machine.start_up()
        machine.follow("install", timeout=600)
        machine.wait()
        machine.run("systemctl stop labkeeper")
        docker("commit", machine.name, tag, timeout=PATIENCE)
    finally:
        machine.close()
    yield tag
    docker("rmi", "-f", tag, check=False)


@pytest.fixture
def machine(installed_image):
    """A new machine for each test, with the service running."""
    machine = Machine(installed_image)
    try:
        machine.start_up()
        machine.wait()
        yield machine
    finally:
        # pytest shows this if the test fails.
        print(machine.journal())  # noqa: T201
        machine.close()

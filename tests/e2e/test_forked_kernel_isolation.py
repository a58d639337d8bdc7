"""Forked kernels have no secrets but their own, and exactly the rights of their server."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import psutil
import pytest

from harness import PassableKeeper, give_hands, parent_of, run_in_server, start_kernel, until
from kernel_processes import (
    LOADER,
    ForkingKeeper,
    delete_servers,
    find_loader,
    fork_kernel,
    launched,
    mark_of,
    ready_to_fork,
    run_source,
    zygote_of,
)
from memory import OWN_MEMORY
from users import USER

pytestmark = pytest.mark.root


# Secrets


@pytest.fixture(scope="module")
def secretive(tmp_path_factory):
    keeper = ForkingKeeper(
        tmp_path_factory.mktemp("kernel-secrets") / "keeper", token=secrets.token_urlsafe(24)
    )
    give_hands(keeper)
    try:
        yield keeper.start_to_fork()
    finally:
        keeper.close()


@pytest.fixture(scope="module")
def servers(secretive):
    """Two servers, each with a kernel that was started before the other server or after it."""
    found = {}
    for name in ("one", "two"):
        env, kernel_env = (secrets.token_urlsafe(24) for _ in range(2))
        server = ready_to_fork(
            secretive, name, env={"OF_SERVER": env}, kernel_env={"OF_KERNELS": kernel_env}
        )
        wanted = {
            f"env of {name}": env.encode(),
            f"kernel_env of {name}": kernel_env.encode(),
            f"token of {name}": server["token"].encode(),
            f"cookie secret of {name}": cookie_secret_of(secretive, server),
        }
        found[name] = server, fork_kernel(server)[0], wanted
    return found


@pytest.fixture(scope="module")
def wanted(secretive, servers):
    every = {"token of the keeper": secretive.token.encode()}
    for _, _, of_server in servers.values():
        every |= of_server
    return every


def cookie_secret_of(keeper, server):
    place = keeper.notebook_dir / "cookie"
    run_in_server(
        server,
        "from jupyter_server.serverapp import ServerApp\n"
        f"with open({str(place)!r}, 'w') as file:\n"
        "    file.write(ServerApp.instance().cookie_secret.hex())",
    )
    try:
        return bytes.fromhex(place.read_text())
    finally:
        place.unlink()


SEARCH = (
    OWN_MEMORY
    + """
import json

wanted = {name: re.compile(pattern.encode()) for name, pattern in @wanted@.items()}
found = set()
for _, content in own_memory():
    found.update(name for name, pattern in wanted.items() if pattern.search(content))
print(json.dumps(sorted(found)))
"""
)


def hidden(value):
    """Return a pattern that matches bytes without containing them, since memory has it, too."""
    return "".join(f"[\\x{byte:02x}]" for byte in value)


@pytest.mark.parametrize("moment", ["early", "late"])
@pytest.mark.parametrize("name", ["one", "two"])
def test_forked_kernel_has_only_the_secrets_that_are_meant_for_it(servers, wanted, name, moment):
    server, early, _ = servers[name]
    kernel = early if moment == "early" else fork_kernel(server)[0]
    patterns = {what: hidden(value) for what, value in wanted.items()}
    found = run_source(server, kernel, SEARCH.replace("@wanted@", repr(patterns)))
    # Those that are in its environment, which also proves that the search works.
    assert found == [f"env of {name}", f"kernel_env of {name}"]


def found_in_memory(process, wanted):
    """Return the names of what the readable memory of a process contains."""
    found = set()
    with (
        Path(f"/proc/{process.pid}/maps").open() as maps,
        Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory,
    ):
        for line in maps:
            addresses, rights = line.split(" ")[:2]
            first, last = (int(address, 16) for address in addresses.split("-"))
            if rights.startswith("rw"):
                memory.seek(first)
                content = memory.read(last - first)
                found |= {name for name, value in wanted.items() if value in content}
    return found


def test_processes_that_fork_kernels_have_no_secrets(servers, wanted):
    """Each kernel inherits their memory."""
    server, other = (found[0] for found in servers.values())
    loader = find_loader(server)
    fork_server = psutil.Process(parent_of(server))
    title = {"title": LOADER.encode()}
    assert found_in_memory(loader, wanted | title) == {"title"}
    for each in (server, other):
        mark = {"mark": mark_of(psutil.Process(each["pid"])).encode()}
        assert found_in_memory(zygote_of(each), wanted | mark) == {"mark"}
    assert found_in_memory(fork_server, wanted) == set()
    # They would be found.
    in_server = found_in_memory(psutil.Process(server["pid"]), wanted)
    assert in_server == {
        f"{what} of one" for what in ("env", "kernel_env", "token", "cookie secret")
    }


# Users


@pytest.fixture(scope="module")
def _of_root(passable):
    keeper = PassableKeeper(passable / "keeper", runtime_dir=passable / "run", launch_by="fork")
    keeper.base.chmod(0o755)
    keeper.notebook_dir.chmod(0o777)
    keeper.variables["SECRET_OF_ROOT"] = secrets.token_urlsafe(24)
    yield keeper.start_to_fork()
    keeper.close()


@pytest.fixture
def keeper(_of_root):
    """A keeper of root, whose servers may run as another user."""
    yield _of_root
    delete_servers(_of_root)


def status_of(pid):
    """Return what Linux shows of a process's user, groups and rights."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    names = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Umask")
    return {
        name: value.split() for name, _, value in lines if name in names or name.startswith("Cap")
    }


PARTS = ["environ", "maps", "mem", "fd"]
"""What only its owner can read of a process."""
RIGHTS = """
import json, os, subprocess

def may(do, *given):
    try:
        do(*given)
    except PermissionError:
        return False
    return True

print(json.dumps({
    "becomes root": may(os.setuid, 0) or may(os.setgid, 0) or may(os.setgroups, [0]),
    "user of a setuid program": subprocess.run(
        [@program@, "-u"], capture_output=True, text=True).stdout.strip(),
    "reads": [path for path in @closed@ if may(os.open, path, os.O_RDONLY)],
    "reads its own": [may(os.open, f"/proc/self/{part}", os.O_RDONLY) for part in @parts@],
    "owner": os.stat("/proc/self/environ").st_uid,
}))
"""


def test_forked_kernel_of_another_user_has_exactly_that_users_rights(keeper, user, passable):
    server = ready_to_fork(keeper, user=USER)
    kernel, pid = fork_kernel(server)
    zygote = zygote_of(server)
    status = status_of(pid)
    assert status == status_of(server["pid"]) == status_of(zygote.pid)
    assert (status["Uid"], status["Gid"]) == ([str(user.pw_uid)] * 4, [str(user.pw_gid)] * 4)
    assert sorted(map(int, status["Groups"])) == sorted(os.getgrouplist(USER, user.pw_gid))
    rights = {name: int(value[0], 16) for name, value in status.items() if name.startswith("Cap")}
    assert (len(rights), set(rights.values()), status["NoNewPrivs"]) == (5, {0}, ["1"])

    program = passable / "id"
    shutil.copyfile("/usr/bin/id", program)
    program.chmod(0o4755)
    fork_server = parent_of(server)
    closed = [
        *keeper.state_dir.iterdir(),
        *(keeper.server_dirs / name for name in (".forkservers", "default/launch.json")),
        *(
            Path(f"/proc/{other}/{part}")
            for other in (keeper.process.pid, fork_server, find_loader(server).pid, zygote.pid)
            for part in PARTS
        ),
    ]
    assert all(path.exists() for path in closed)
    source = RIGHTS.replace("@program@", repr(str(program))).replace("@parts@", repr(PARTS))
    found = run_source(server, kernel, source.replace("@closed@", repr([*map(str, closed)])))
    assert found == {
        "becomes root": False,
        "user of a setuid program": str(user.pw_uid),
        "reads": [],
        "reads its own": [True] * len(PARTS),
        "owner": user.pw_uid,
    }


OPEN_FILES = """
import json, os, socket
found = []
for number in sorted(map(int, os.listdir("/proc/self/fd"))):
    try:
        file = os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:
        continue
    kind, _, more = file.partition(":")
    if kind == "socket":
        with socket.socket(fileno=os.dup(number)) as one:
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            kind = f"{one.family.name} {'listens' if listens else 'is connected'}"
    # ZeroMQ has as many of these as clients, and more.
    if kind != "AF_INET is connected" and more not in {"[eventfd]", "[eventpoll]"}:
        found.append(f"anonymous {more}" if kind == "anon_inode" else kind)
print(json.dumps(found))
"""


def test_forked_kernel_inherits_no_open_files(keeper, user):
    """It has what an executed one has, which inherits nothing."""
    forks = ready_to_fork(keeper, "forks", user=USER)
    executes = keeper.post(name="executes", user=USER, kernels_by="exec").json()
    found = []
    for server, by in ((forks, "fork"), (executes, "exec")):
        kernel = start_kernel(server)
        assert launched(server, kernel)[0] == by
        files = run_source(server, kernel, OPEN_FILES)
        found.append(Counter(file.replace(f"{server['name']}.log", "ITS.log") for file in files))
    of_forked, of_executed = found
    assert of_forked[str(keeper.state_dir / "logs" / "ITS.log")] == 2
    # Its report pipe and a handle of the server, by either of which it is told to end.
    assert of_forked - of_executed == {"pipe": 1, "anonymous [pidfd]": 1}
    assert not of_executed - of_forked


SLOW_WRITE = """
import os, time
from ipykernel import kernelapp

def write(path, *given, write=kernelapp.write_connection_file, **named):
    open(path, "w").close()
    time.sleep(0.5)
    write(path, *given, **named)
    open(os.path.join(os.environ["IPYTHONDIR"], "written"), "w").close()

kernelapp.write_connection_file = write
"""


def ipython_dir(passable, name):
    """Create a directory for IPython's files in the user's home; return it."""
    directory = passable / "home" / name
    (directory / "profile_default" / "startup").mkdir(parents=True)
    return directory


def give_to_user(directory):
    subprocess.run(["chown", "-R", f"{USER}:", directory], check=True)


def test_server_waits_until_a_kernel_has_rewritten_its_connection_file(keeper, user, passable):
    """With encryption, as for kernels of other users, the file is removed and written again."""
    directory = ipython_dir(passable, "slow")
    (directory / "profile_default" / "ipython_kernel_config.py").write_text(SLOW_WRITE)
    give_to_user(directory)
    server = ready_to_fork(keeper, user=USER, kernel_env={"IPYTHONDIR": str(directory)})
    fork_kernel(server)
    assert (directory / "written").exists()


RECORD_GROUPS = """
import pathlib
pathlib.Path({place!r}).write_text(pathlib.Path("/proc/self/cgroup").read_text())
"""
LIMITS = {"none": {}, "all": {"memory_limit": 2**30, "process_limit": 200, "cpu_limit": 2.0}}


@pytest.mark.parametrize("limits", LIMITS)
def test_forked_kernel_is_in_the_control_groups_of_its_server_from_its_start(
    keeper, user, passable, limits
):
    ipython = ipython_dir(passable, f"limits-{limits}")
    place = ipython / "groups"
    record = ipython / "profile_default" / "startup" / "record.py"
    record.write_text(RECORD_GROUPS.format(place=str(place)))
    give_to_user(ipython)
    server = ready_to_fork(
        keeper, user=USER, kernel_env={"IPYTHONDIR": str(ipython)}, **LIMITS[limits]
    )
    _, pid = fork_kernel(server)

    def groups(process):
        return Path(f"/proc/{process}/cgroup").read_text()

    # Without limits, the keeper moves the server while it starts.
    until(lambda: groups(server["pid"]) == groups(pid), what="the server to be in its group")
    assert place.read_text() == groups(pid) == groups(zygote_of(server).pid)
    assert groups(pid) != groups(parent_of(server)) or "labkeeper" not in groups(keeper.process.pid)


WITHOUT_GROUPS = """
while umount -l /sys/fs/cgroup 2>/dev/null; do :; done
grep -q cgroup /proc/self/mounts && exit 9
exec "$@"
"""


def test_forked_kernel_has_the_resource_limits_of_its_server(tmp_path):
    """They stand in for control groups, which this keeper does not find in its mount namespace."""
    keeper = ForkingKeeper(tmp_path / "keeper")
    command = keeper.command
    hide = ["unshare", "-m", "sh", "-c", WITHOUT_GROUPS, "sh"]
    keeper.command = lambda *given: [*hide, *command(*given)]
    try:
        keeper.start_to_fork()
        server = ready_to_fork(keeper, memory_limit=600 * 2**20)
        assert server["limits"]["memory"]["limited_by"] == "rlimit"
        _, pid = fork_kernel(server)
        limits = {
            one: Path(f"/proc/{one}/limits").read_text()
            for one in (server["pid"], zygote_of(server).pid, pid)
        }
        assert len(set(limits.values())) == 1
        data = next(line for line in limits[pid].splitlines() if line.startswith("Max data size"))
        assert data.split()[3:5] == [str(600 * 2**20)] * 2
    finally:
        keeper.close()

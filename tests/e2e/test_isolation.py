"""A server gains no rights, and learns nothing of its keeper: neither from /proc, nor from files, nor by what it runs."""

from __future__ import annotations

import base64
import json
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from harness import (
    PATIENCE,
    PassableKeeper,
    everything_below,
    forked,
    run_cell,
    start_kernel,
    until,
)
from memory import OWN_MEMORY, hidden

USER = f"labkeeper-s{os.getpid()}"
BY = pytest.mark.parametrize("launch_by", ["fork", "exec"])

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def passable():
    """A directory that everybody can pass through; those of pytest are for their owner."""
    directory = Path(tempfile.mkdtemp(prefix="labkeeper-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def user(passable):
    """A user of this machine, for this module only."""
    subprocess.run(
        [
            "useradd",
            "--create-home",
            "--home-dir",
            passable / "home",
            "--user-group",
            "--groups",
            "users",
            USER,
        ],
        check=True,
    )
    yield pwd.getpwnam(USER)
    subprocess.run(["userdel", "--force", USER], check=True)


SECRETS = {
    "token": secrets.token_urlsafe(24),
    "webhook_secret": base64.b64encode(secrets.token_bytes(32)).decode(),
    "foo_secret": secrets.token_urlsafe(24),
}
"""What a keeper has in its environment; the last one is no setting, as if its name were misspelled."""
OF_ROOT = {"AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(24)}
"""What a keeper of root has there besides, for its own use; its servers that run as root have it, too."""


def secretive(base, **settings):
    """A keeper with secrets in its environment."""
    keeper = PassableKeeper(
        base, launch_by="fork", webhook_url="http://127.0.0.1:9/", **SECRETS | settings
    )
    keeper.base.chmod(0o755)
    keeper.notebook_dir.chmod(0o777)
    return keeper


@pytest.fixture(scope="module")
def of_root(passable, user):
    """A keeper of root, whose servers run as somebody else."""
    keeper = secretive(passable / "of-root", runtime_dir=passable / "run")
    keeper.variables.update(OF_ROOT)
    yield keeper.start()
    keeper.close()


@pytest.fixture(scope="module")
def of_user(passable, user):
    """A keeper of an ordinary user, as whom its servers run, too."""
    keeper = secretive(passable / "of-user")
    keeper.runs_as = USER
    yield keeper.start()
    keeper.close()


LOOK = """
    import contextlib, os, subprocess, sys
    from pathlib import Path

    # Written backwards: this cell itself is in files and in memory.
    WANTED = {name: text[::-1].encode() for name, text in @wanted@.items()}
    PLACES, SINCE = @places@, @since@
    LARGEST = 1 << 22
    found = set()

    def look(content, where):
        found.update((name, str(where)) for name, text in WANTED.items() if text in content)

    def memory(process):
        with open(f"{process}/mem", "rb", buffering=0) as stream:
            for line in Path(f"{process}/maps").read_text().splitlines():
                first, _, end = line.split()[0].partition("-")
                if line.split()[1].startswith("r"):
                    with contextlib.suppress(OSError, ValueError):
                        stream.seek(int(first, 16))
                        look(stream.read(int(end, 16) - int(first, 16)), f"{process}/mem")

    planted = Path.home() / "planted"
    planted.write_bytes(WANTED["control"])
    beside = subprocess.Popen(["sleep", "100"], env={"CONTROL": WANTED["control"].decode()})
    look(os.fsencode(repr(dict(os.environ))), "os.environ")
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        for part in ("environ", "cmdline"):
            with contextlib.suppress(OSError):
                look((process / part).read_bytes(), process / part)
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if descriptor.is_file():
                        look(descriptor.read_bytes()[:LARGEST], descriptor)
        with contextlib.suppress(OSError):
            memory(process)
    for place in PLACES:
        for directory, _, names in os.walk(place):
            for path in (Path(directory, name) for name in names):
                with contextlib.suppress(OSError):
                    if path.is_file() and SINCE <= path.stat().st_mtime and path.stat().st_size <= LARGEST:
                        look(path.read_bytes(), path)
    beside.kill()
    beside.wait()
    planted.unlink()
    found = {(name, where.replace(f"/{beside.pid}/", "/beside/")) for name, where in found}
    # The search is proved by what was planted, which it must find in each of these ways.
    control = {("control", str(planted)), ("control", "/proc/beside/environ"), ("control", "/proc/beside/mem")}
    print(sorted(found - control))
    print(control <= found, os.access("/proc/@keeper@/stat", os.R_OK))
"""


OPEN = """
try:
    open("/proc/{}/{}", "rb").read(1)
except OSError as error:
    print(error.errno)
"""


def found_by_a_notebook(keeper, server, wanted):
    """Let a notebook look for secrets wherever it can; give what it found, and where."""
    places = [keeper.state_dir, keeper.base, keeper.server_dirs, "/tmp", server["root_dir"]]
    told = {
        "wanted": {
            name: text[::-1] for name, text in {**wanted, "control": secrets.token_hex(16)}.items()
        },
        "places": [*map(str, places)],
        "since": time.time() - 600,
        "keeper": keeper_of(keeper),
    }
    source = textwrap.dedent(LOOK)
    for name, value in told.items():
        source = source.replace(f"@{name}@", repr(value))
    found, control = run_cell(server, start_kernel(server), source).strip().splitlines()
    assert control == "True True"
    return eval(found)


def keeper_of(keeper):
    """The pid of the keeper itself."""
    return json.loads((keeper.state_dir / "keeper.json").read_text())["pid"]


@BY
def test_a_notebook_finds_no_secret_of_a_keeper_of_its_own_user(of_user, launch_by):
    server = launched(of_user, "curious", launch_by)
    assert found_by_a_notebook(of_user, server, SECRETS) == []
    kernel = start_kernel(server)
    for part in ("environ", "mem", "maps"):
        assert run_cell(server, kernel, OPEN.format(keeper_of(of_user), part)).strip() == "13", part
    assert (
        run_cell(
            server, kernel, f"import os; print(os.access('/proc/{keeper_of(of_user)}/fd', os.R_OK))"
        ).strip()
        == "False"
    )
    assert of_user.delete("curious").status_code == 200


def test_a_token_that_was_generated_is_in_its_own_file_and_nowhere_else(passable, user):
    """Whoever runs as the keeper's user can read what that user can: this is what separate users are for."""
    keeper = PassableKeeper(passable / "generated", launch_by="exec")
    keeper.runs_as = USER
    keeper.base.chmod(0o755)
    keeper.start()
    try:
        server = keeper.post().json()
        assert found_by_a_notebook(keeper, server, {"token": keeper.token}) == [
            ("token", str(keeper.state_dir / "token"))
        ]
    finally:
        keeper.close()


@BY
def test_a_notebook_of_another_user_finds_nothing_of_its_keeper_at_all(of_root, user, launch_by):
    server = launched(of_root, "stranger", launch_by, user=USER)
    assert found_by_a_notebook(of_root, server, SECRETS | OF_ROOT) == []
    cell = f"import os; print([os.access(path, os.R_OK) for path in {list(map(str, of_root.state_dir.iterdir()))}])"
    assert "True" not in run_cell(server, start_kernel(server), cell)
    assert of_root.delete("stranger").status_code == 200


LOOK_INTO_ITSELF = (
    OWN_MEMORY
    + """
import json

wanted = {name: re.compile(pattern.encode()) for name, pattern in @wanted@.items()}
control = bytes.fromhex("@control@")
found = {}
for line, content in own_memory():
    for name, pattern in wanted.items():
        if (at := pattern.search(content)) is not None:
            found.setdefault(name, [line, repr(content[max(0, at.start() - 300) : at.end() + 300])])
(Path.home() / "found.json").write_text(json.dumps(found))
"""
)


@BY
def test_a_server_of_another_user_has_no_secret_of_its_keeper_in_its_own_memory(
    of_root, user, passable, launch_by
):
    """Its user's configuration is run in it, and reads what was there before the fork as well."""
    control = secrets.token_hex(16)
    wanted = {
        name: hidden(text) for name, text in (SECRETS | OF_ROOT | {"control": control}).items()
    }
    source = LOOK_INTO_ITSELF.replace("@wanted@", repr(wanted)).replace(
        "@control@", control.encode().hex()
    )
    place = passable / "home" / ".jupyter"
    place.mkdir(exist_ok=True)
    shutil.chown(place, USER)
    (place / "jupyter_server_config.py").write_text(source)
    try:
        server = launched(of_root, "introspective", launch_by, user=USER)
        assert server["user"] == USER
        found = json.loads((passable / "home" / "found.json").read_text())
        assert list(found) == ["control"], found
    finally:
        of_root.delete("introspective")
        shutil.rmtree(place)


@BY
def test_a_file_that_a_user_deletes_goes_to_the_trash_of_that_user(
    of_root, user, passable, launch_by
):
    """A fork has what was made of the keeper's user before."""
    server = launched(of_root, "tidy", launch_by, user=USER)
    run_cell(server, start_kernel(server), f"open('of-{launch_by}', 'w').close()")
    answer = httpx.delete(
        f"{server['url']}api/contents/of-{launch_by}",
        headers={"Authorization": f"token {server['token']}"},
        trust_env=False,
    )
    assert answer.status_code == 204, answer.text
    thrown_away = passable / "home" / ".local" / "share" / "Trash" / "files" / f"of-{launch_by}"
    assert thrown_away.stat().st_uid == user.pw_uid
    assert of_root.delete("tidy").status_code == 200


def test_a_server_of_roots_own_is_forked_and_has_all_that_its_keeper_has(of_root):
    server = forked(of_root, "own")
    cell = f"import os; print(os.environ.get({next(iter(OF_ROOT))!r}))"
    assert run_cell(server, start_kernel(server), cell).strip() == next(iter(OF_ROOT.values()))
    assert of_root.delete("own").status_code == 200


LISTEN = """
import os, sys, zmq
from zmq.utils.monitor import recv_monitor_message

os.setuid(65534)
listener = zmq.Context().socket(zmq.SUB)
monitor = listener.get_monitor_socket()
listener.subscribe(b"")
listener.connect(f"tcp://127.0.0.1:{sys.argv[1]}")
settled = {zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
           zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_DISCONNECTED}
while recv_monitor_message(monitor)["event"] not in settled:
    pass
print("there", flush=True)
poller = zmq.Poller()
poller.register(listener, zmq.POLLIN)
poller.register(sys.stdin, zmq.POLLIN)
heard = b""
while (ready := dict(poller.poll())) and listener in ready or sys.stdin.fileno() not in ready:
    heard += b"".join(listener.recv_multipart())
print(b"whispered" in heard)
"""


def heard_by_another_user(server, kernel):
    """Let a cell run while somebody listens at the port of its output, as everybody can; say whether that is heard."""
    port = json.loads(connection_of(server, kernel).read_text())["iopub_port"]
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as listener:
        assert listener.stdout.readline() == "there\n"
        for _ in range(5):
            assert run_cell(server, kernel, "print('whispered')") == "whispered\n"
        said, _ = listener.communicate(timeout=PATIENCE)
    return said.strip() == "True"


def connection_of(server, kernel):
    variables = Path(f"/proc/{server['pid']}/environ").read_bytes().split(b"\0")
    (server_dir,) = (
        value
        for name, _, value in (line.partition(b"=") for line in variables)
        if name == b"LABKEEPER_SERVER"
    )
    return Path(os.fsdecode(server_dir).rstrip()) / "jupyter" / f"kernel-{kernel}.json"


def asked(server, path):
    known = {"Authorization": f"token {server['token']}"}
    answer = httpx.post(
        f"{server['url']}api/{path}", headers=known, trust_env=False, timeout=PATIENCE
    )
    assert answer.is_success, answer.text


@BY
def test_no_other_user_hears_what_a_kernel_of_a_user_says(of_root, launch_by):
    """Its ports are open to all users of the machine. Restarted, interrupted and beside another one, too."""
    server = launched(of_root, "private", launch_by, user=USER)
    kernels = [start_kernel(server) for _ in range(2)]
    asked(server, f"kernels/{kernels[0]}/restart")
    begun = of_root.notebook_dir / f"begun-{launch_by}"
    with ThreadPoolExecutor() as beside:
        endless = beside.submit(
            run_cell, server, kernels[0], f"open({str(begun)!r}, 'w').close()\nwhile True: pass"
        )
        until(begun.exists, what="the cell runs")
        asked(server, f"kernels/{kernels[0]}/interrupt")
        assert "KeyboardInterrupt" in str(endless.exception(PATIENCE))
    assert [heard_by_another_user(server, kernel) for kernel in kernels] == [False, False]
    assert "transport_encryption" not in (of_root.state_dir / "logs" / "private.log").read_text()
    assert of_root.delete("private").status_code == 200


CHOICES = {"": True, "c.KernelManager.transport_encryption = 'auto'": False}
"""Of a site, for servers of the keeper's own user: whether kernels are heard then."""


@pytest.mark.parametrize("choice", CHOICES, ids=["none", "auto"])
def test_a_site_may_choose_whether_its_kernels_are_heard(make_keeper, choice):
    """This also proves that who listens would hear."""
    keeper = make_keeper()
    keeper.configure_jupyter(choice)
    server = keeper.start().post().json()
    assert heard_by_another_user(server, start_kernel(server)) is CHOICES[choice]


def launched(keeper, name, launch_by, **body):
    if launch_by == "fork":
        return forked(keeper, name, **body)
    # That takes effect only when a program starts.
    server = keeper.post(name=name, env={"LC_LABKEEPER": "1"}, **body).json()
    assert (server["state"], server["launched_by"]) == ("running", "exec"), server
    return server


def status_in(server):
    said = run_cell(server, start_kernel(server), "print(open('/proc/self/status').read())")
    return {
        name: value.split()
        for name, _, value in (line.partition(":") for line in said.splitlines())
    }


@BY
def test_a_server_of_another_user_has_that_users_rights_and_no_way_back(
    of_root, user, passable, launch_by
):
    server = launched(of_root, "low", launch_by, user=USER)
    status = status_in(server)
    assert status["Uid"] == [str(user.pw_uid)] * 4
    assert status["Gid"] == [str(user.pw_gid)] * 4
    assert sorted(map(int, status["Groups"])) == sorted(os.getgrouplist(USER, user.pw_gid))
    assert [int(value[0], 16) for name, value in status.items() if name.startswith("Cap")] == [
        0
    ] * 5
    assert status["NoNewPrivs"] == ["1"]
    # A program that would run as root runs as whoever starts it.
    program = passable / "id"
    shutil.copyfile("/usr/bin/id", program)
    program.chmod(0o4755)
    cell = f"import subprocess; print(subprocess.run([{str(program)!r}, '-u'], capture_output=True, text=True).stdout)"
    assert run_cell(server, start_kernel(server), cell).split() == [str(user.pw_uid)]
    assert of_root.delete("low").status_code == 200


def test_a_keeper_of_root_warns_of_servers_that_name_no_user(of_root, of_user):
    warning = "set LABKEEPER_USER to run it as another user"
    # They answer before they have said all.
    said = [
        until(lambda keeper=keeper: "keeper is ready" in (log := keeper.log.read_text()) and log)
        for keeper in (of_root, of_user)
    ]
    assert [log.count(warning) for log in said] == [1, 0]


@BY
def test_no_server_gains_rights_by_what_it_runs(of_user, launch_by):
    server = launched(of_user, "plain", launch_by)
    assert status_in(server)["NoNewPrivs"] == ["1"]
    terminal = httpx.post(
        f"{server['url']}api/terminals",
        headers={"Authorization": f"token {server['token']}"},
        trust_env=False,
        timeout=PATIENCE,
    )
    assert terminal.status_code == 200
    (shell,) = (
        pid for pid in children(server["pid"]) if "sh" in Path(f"/proc/{pid}/comm").read_text()
    )
    assert "NoNewPrivs:\t1" in Path(f"/proc/{shell}/status").read_text()
    assert of_user.delete("plain").status_code == 200


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def open_to_others(place, *, but=()):
    """Name what anybody but its owner has any right to."""
    found = [
        each
        for each in everything_below(place)
        if not any(each.path.is_relative_to(own) for own in but)
    ]
    assert found
    return [f"{each.path} {each.mode:o}" for each in found if each.mode & 0o077]


@BY
def test_all_that_a_keeper_and_its_servers_write_is_for_their_owner_alone(make_keeper, launch_by):
    keeper = unmasked(make_keeper(launch_by=launch_by, log_max_bytes=1024, probe_period=1)).start()
    # What the test made, and what IPython copies with the mode that it was installed with, into a directory that is closed.
    ipython = keeper.base / ".ipython" / "profile_default"
    others = {keeper.notebook_dir, keeper.config_dir, keeper.base / "bin", keeper.log, ipython}
    server = launched_any(keeper, launch_by)
    kernel = start_kernel(server)
    run_cell(server, kernel, "open('made', 'w').close()")
    until((keeper.state_dir / "logs" / "default.log.1").exists, what="the log is rotated")
    assert open_to_others(keeper.base, but=others) == []
    assert open_to_others(keeper.notebook_dir) == []
    kinds = {
        each.path.name.partition("-")[0].partition(".")[0]
        for each in everything_below(keeper.state_dir)
    }
    assert {
        "labkeeper",
        "keeper",
        "token",
        "launch",
        "kernels",
        "jpserver",
        "kernel",
        "default",
        "logs",
        "run",
    } <= kinds
    assert {"labkeeper.sqlite-wal", "labkeeper.sqlite-shm"} <= {
        path.name for path in keeper.state_dir.iterdir()
    }
    assert keeper.post("/default/restart").status_code in {200, 201}
    start_kernel(keeper.get())
    assert open_to_others(keeper.base, but=others) == []


def unmasked(keeper):
    """Let a keeper be started by somebody who masks nothing."""
    command = keeper.command
    keeper.command = lambda *arguments: [
        "sh",
        "-c",
        'umask 000; exec "$@"',
        "sh",
        *command(*arguments),
    ]
    return keeper


def launched_any(keeper, launch_by):
    return forked(keeper) if launch_by == "fork" else keeper.post().json()


@BY
def test_what_servers_make_is_open_to_whom_the_setting_lets_in(make_keeper, launch_by):
    keeper = unmasked(make_keeper(launch_by=launch_by, umask="022")).start()
    server = launched_any(keeper, launch_by)
    kernel = start_kernel(server)
    run_cell(server, kernel, "import os; open('made', 'w').close(); os.mkdir('directory')")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in keeper.notebook_dir.iterdir()}
    assert modes == {"made": 0o644, "directory": 0o755}
    assert run_cell(server, kernel, "print(oct(os.umask(0o022)))").strip() == "0o22"
    # What has secrets in it is not.
    assert open_to_others(keeper.state_dir) == []


def test_process_1_of_a_container_is_closed_too(passable, user):
    """Its environment is the keeper's: that of the container, with the token."""
    keeper = PassableKeeper(passable / "contained", launch_by="exec", token=SECRETS["token"])
    keeper.runs_as = USER
    keeper.base.chmod(0o755)
    command = keeper.command
    keeper.command = lambda *arguments: [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        *command(*arguments),
    ]
    keeper.start()
    try:
        init = children(keeper.process.pid)[0]
        below = children(init)
        assert "serve" in Path(f"/proc/{below[0]}/cmdline").read_text()
        for pid in (init, below[0]):
            # Only of a process that is closed does /proc give the files to root.
            assert Path(f"/proc/{pid}/environ").stat().st_uid == 0
            assert f"Uid:\t{user.pw_uid}" in Path(f"/proc/{pid}/status").read_text()
    finally:
        os.kill(init, 15)
        keeper.process.wait(PATIENCE)
        keeper.http.close()
        keeper.sweep()

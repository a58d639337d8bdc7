"""A server gains no privileges, and finds no keeper secrets in /proc, files or its own memory."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
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
from users import USER

both_launch_methods = pytest.mark.parametrize("launch_by", ["fork", "exec"])

pytestmark = pytest.mark.root


KEEPER_SECRETS = {
    "token": secrets.token_urlsafe(24),
    "webhook_secret": base64.b64encode(secrets.token_bytes(32)).decode(),
    "foo_secret": secrets.token_urlsafe(24),
}
"""Variables of the keeper's environment; `foo_secret` is not a setting, like a misspelled one."""
ROOT_ENV = {"AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(24)}
"""Additional variables of a root keeper; servers that run as root inherit them."""


def keeper_with_secrets(base, **settings):
    """Return a keeper with secrets in its environment."""
    keeper = PassableKeeper(
        base, launch_by="fork", webhook_url="http://127.0.0.1:9/", **KEEPER_SECRETS | settings
    )
    keeper.base.chmod(0o755)
    keeper.notebook_dir.chmod(0o777)
    return keeper


@pytest.fixture(scope="module")
def root_keeper(passable, user):
    """A root keeper whose servers run as another user."""
    keeper = keeper_with_secrets(passable / "of-root", runtime_dir=passable / "run")
    keeper.variables.update(ROOT_ENV)
    yield keeper.start()
    keeper.close()


@pytest.fixture(scope="module")
def user_keeper(passable, user):
    """A keeper that runs as an ordinary user, and so do its servers."""
    keeper = keeper_with_secrets(passable / "of-user")
    keeper.runs_as = USER
    yield keeper.start()
    keeper.close()


SEARCH_SECRETS = """
    import contextlib, os, subprocess, sys
    from pathlib import Path

    # Reversed, because this cell itself is in files and in memory.
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
                    stat = path.stat()
                    if path.is_file() and SINCE <= stat.st_mtime and stat.st_size <= LARGEST:
                        look(path.read_bytes(), path)
    beside.kill()
    beside.wait()
    planted.unlink()
    found = {(name, where.replace(f"/{beside.pid}/", "/beside/")) for name, where in found}
    # To prove that the search works, it must find each of the planted secrets.
    control = {
        ("control", str(planted)),
        ("control", "/proc/beside/environ"),
        ("control", "/proc/beside/mem"),
    }
    print(sorted(found - control))
    print(control <= found, os.access("/proc/@keeper@/stat", os.R_OK))
"""


OPEN_PROC_FILE = """
try:
    open("/proc/{}/{}", "rb").read(1)
except OSError as error:
    print(error.errno)
"""


def secrets_found_by_notebook(keeper, server, wanted):
    """Search for secrets from a notebook, and return which were found, and where."""
    places = [keeper.state_dir, keeper.base, keeper.server_dirs, "/tmp", server["root_dir"]]
    values = {
        "wanted": {
            name: text[::-1] for name, text in {**wanted, "control": secrets.token_hex(16)}.items()
        },
        "places": [*map(str, places)],
        "since": time.time() - 600,
        "keeper": keeper_pid(keeper),
    }
    source = textwrap.dedent(SEARCH_SECRETS)
    for name, value in values.items():
        source = source.replace(f"@{name}@", repr(value))
    found, control = run_cell(server, start_kernel(server), source).strip().splitlines()
    assert control == "True True"
    return eval(found)


def keeper_pid(keeper):
    """Return the pid of the keeper itself."""
    return json.loads((keeper.state_dir / "keeper.json").read_text())["pid"]


@both_launch_methods
def test_notebook_finds_no_secrets_of_a_keeper_running_as_the_same_user(user_keeper, launch_by):
    server = launch(user_keeper, "curious", launch_by)
    assert secrets_found_by_notebook(user_keeper, server, KEEPER_SECRETS) == []
    kernel = start_kernel(server)
    for part in ("environ", "mem", "maps"):
        assert (
            run_cell(server, kernel, OPEN_PROC_FILE.format(keeper_pid(user_keeper), part)).strip()
            == "13"
        ), part
    assert (
        run_cell(
            server,
            kernel,
            f"import os; print(os.access('/proc/{keeper_pid(user_keeper)}/fd', os.R_OK))",
        ).strip()
        == "False"
    )
    assert user_keeper.delete("curious").status_code == 200


def test_generated_token_is_only_in_the_token_file(passable, user):
    """A process of the keeper's user can read that user's files; separate users prevent that."""
    keeper = PassableKeeper(passable / "generated", launch_by="exec")
    keeper.runs_as = USER
    keeper.base.chmod(0o755)
    keeper.start()
    try:
        server = keeper.post().json()
        assert secrets_found_by_notebook(keeper, server, {"token": keeper.token}) == [
            ("token", str(keeper.state_dir / "token"))
        ]
    finally:
        keeper.close()


@both_launch_methods
def test_notebook_of_another_user_finds_no_secrets_or_files_of_the_keeper(
    root_keeper, user, launch_by
):
    server = launch(root_keeper, "stranger", launch_by, user=USER)
    assert secrets_found_by_notebook(root_keeper, server, KEEPER_SECRETS | ROOT_ENV) == []
    cell = (
        "import os; print([os.access(path, os.R_OK) for path in"
        f" {list(map(str, root_keeper.state_dir.iterdir()))}])"
    )
    assert "True" not in run_cell(server, start_kernel(server), cell)
    assert root_keeper.delete("stranger").status_code == 200


SEARCH_OWN_MEMORY = (
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


@both_launch_methods
def test_server_of_another_user_inherits_no_keeper_secrets_in_memory(
    root_keeper, user, passable, launch_by
):
    """The search runs in the user's Jupyter configuration, and covers inherited memory, too."""
    control = secrets.token_hex(16)
    wanted = {
        name: hidden(text)
        for name, text in (KEEPER_SECRETS | ROOT_ENV | {"control": control}).items()
    }
    source = SEARCH_OWN_MEMORY.replace("@wanted@", repr(wanted)).replace(
        "@control@", control.encode().hex()
    )
    place = passable / "home" / ".jupyter"
    place.mkdir(exist_ok=True)
    shutil.chown(place, USER)
    (place / "jupyter_server_config.py").write_text(source)
    try:
        server = launch(root_keeper, "introspective", launch_by, user=USER)
        assert server["user"] == USER
        found = json.loads((passable / "home" / "found.json").read_text())
        assert list(found) == ["control"], found
    finally:
        root_keeper.delete("introspective")
        shutil.rmtree(place)


@both_launch_methods
def test_deleted_file_goes_to_the_trash_of_the_servers_user(root_keeper, user, passable, launch_by):
    """The fork server was preloaded as the keeper's user."""
    server = launch(root_keeper, "tidy", launch_by, user=USER)
    run_cell(server, start_kernel(server), f"open('of-{launch_by}', 'w').close()")
    answer = httpx.delete(
        f"{server['url']}api/contents/of-{launch_by}",
        headers={"Authorization": f"token {server['token']}"},
        trust_env=False,
    )
    assert answer.status_code == 204, answer.text
    thrown_away = passable / "home" / ".local" / "share" / "Trash" / "files" / f"of-{launch_by}"
    assert thrown_away.stat().st_uid == user.pw_uid
    assert root_keeper.delete("tidy").status_code == 200


def test_server_running_as_root_inherits_the_keepers_environment(root_keeper):
    server = forked(root_keeper, "own")
    cell = f"import os; print(os.environ.get({next(iter(ROOT_ENV))!r}))"
    assert run_cell(server, start_kernel(server), cell).strip() == next(iter(ROOT_ENV.values()))
    assert root_keeper.delete("own").status_code == 200


LISTEN_TO_KERNEL = """
import os, sys, zmq
from zmq.utils.monitor import recv_monitor_message

os.setuid(65534)
listener = zmq.Context().socket(zmq.SUB)
monitor = listener.get_monitor_socket()
listener.subscribe(b"")
listener.connect(f"tcp://127.0.0.1:{sys.argv[1]}")
settled = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_DISCONNECTED,
}
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


def output_is_readable_by_another_user(server, kernel):
    """Run a cell while another user subscribes to its output; return whether that user sees it."""
    port = json.loads(connection_file(server, kernel).read_text())["iopub_port"]
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN_TO_KERNEL, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as listener:
        assert listener.stdout.readline() == "there\n"
        for _ in range(5):
            assert run_cell(server, kernel, "print('whispered')") == "whispered\n"
        output, _ = listener.communicate(timeout=PATIENCE)
    return output.strip() == "True"


def connection_file(server, kernel):
    variables = Path(f"/proc/{server['pid']}/environ").read_bytes().split(b"\0")
    (server_dir,) = (
        value
        for name, _, value in (line.partition(b"=") for line in variables)
        if name == b"LABKEEPER_SERVER"
    )
    return Path(os.fsdecode(server_dir).rstrip()) / "jupyter" / f"kernel-{kernel}.json"


def post_to_server(server, path):
    headers = {"Authorization": f"token {server['token']}"}
    answer = httpx.post(
        f"{server['url']}api/{path}", headers=headers, trust_env=False, timeout=PATIENCE
    )
    assert answer.is_success, answer.text


@both_launch_methods
def test_kernel_output_is_not_readable_by_other_users(root_keeper, launch_by):
    """Any local user can connect to its ports; also after a restart and an interrupt."""
    server = launch(root_keeper, "private", launch_by, user=USER)
    kernels = [start_kernel(server) for _ in range(2)]
    post_to_server(server, f"kernels/{kernels[0]}/restart")
    running = root_keeper.notebook_dir / f"begun-{launch_by}"
    with ThreadPoolExecutor() as beside:
        endless = beside.submit(
            run_cell, server, kernels[0], f"open({str(running)!r}, 'w').close()\nwhile True: pass"
        )
        until(running.exists, what="the cell to start")
        post_to_server(server, f"kernels/{kernels[0]}/interrupt")
        assert "KeyboardInterrupt" in str(endless.exception(PATIENCE))
    assert [output_is_readable_by_another_user(server, kernel) for kernel in kernels] == [
        False,
        False,
    ]
    assert (
        "transport_encryption" not in (root_keeper.state_dir / "logs" / "private.log").read_text()
    )
    assert root_keeper.delete("private").status_code == 200


SITE_CONFIGS = {"": True, "c.KernelManager.transport_encryption = 'auto'": False}
"""Jupyter configurations, and whether output of the keeper's own user's kernels is readable."""


@pytest.mark.parametrize("config", SITE_CONFIGS, ids=["none", "auto"])
def test_site_can_enable_kernel_transport_encryption(make_keeper, config):
    """Without encryption the output is readable, which also proves that the listener works."""
    keeper = make_keeper()
    keeper.configure_jupyter(config)
    server = keeper.start().post().json()
    assert output_is_readable_by_another_user(server, start_kernel(server)) is SITE_CONFIGS[config]


def launch(keeper, name, launch_by, **body):
    if launch_by == "fork":
        return forked(keeper, name, **body)
    # This variable takes effect only at interpreter startup, so the server must be executed.
    server = keeper.post(name=name, env={"LC_LABKEEPER": "1"}, **body).json()
    assert (server["state"], server["launched_by"]) == ("running", "exec"), server
    return server


def process_status(server):
    status = run_cell(server, start_kernel(server), "print(open('/proc/self/status').read())")
    return {
        name: value.split()
        for name, _, value in (line.partition(":") for line in status.splitlines())
    }


@both_launch_methods
def test_server_of_another_user_cannot_regain_root(root_keeper, user, passable, launch_by):
    server = launch(root_keeper, "low", launch_by, user=USER)
    status = process_status(server)
    assert status["Uid"] == [str(user.pw_uid)] * 4
    assert status["Gid"] == [str(user.pw_gid)] * 4
    assert sorted(map(int, status["Groups"])) == sorted(os.getgrouplist(USER, user.pw_gid))
    assert [int(value[0], 16) for name, value in status.items() if name.startswith("Cap")] == [
        0
    ] * 5
    assert status["NoNewPrivs"] == ["1"]
    # A setuid program runs as the user who starts it.
    program = passable / "id"
    shutil.copyfile("/usr/bin/id", program)
    program.chmod(0o4755)
    cell = (
        f"import subprocess; print(subprocess.run([{str(program)!r}, '-u'],"
        " capture_output=True, text=True).stdout)"
    )
    assert run_cell(server, start_kernel(server), cell).split() == [str(user.pw_uid)]
    assert root_keeper.delete("low").status_code == 200


def test_root_keeper_warns_about_servers_without_a_user(root_keeper, user_keeper):
    warning = "set LABKEEPER_USER to run it as another user"
    # The API responds before everything is logged.
    logs = [
        until(lambda keeper=keeper: "keeper is ready" in (log := keeper.log.read_text()) and log)
        for keeper in (root_keeper, user_keeper)
    ]
    assert [log.count(warning) for log in logs] == [1, 0]


@both_launch_methods
def test_servers_and_terminals_run_with_no_new_privs(user_keeper, launch_by):
    server = launch(user_keeper, "plain", launch_by)
    assert process_status(server)["NoNewPrivs"] == ["1"]
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
    assert user_keeper.delete("plain").status_code == 200


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def accessible_by_others(place, *, but=()):
    """Return the files and directories that others than their owner can access."""
    found = [
        each
        for each in everything_below(place)
        if not any(each.path.is_relative_to(own) for own in but)
    ]
    assert found
    return [
        f"{each.path} {each.mode:o}"
        for each in found
        # The edge of a root keeper has another user, and passes through one directory.
        if each.mode & 0o077 and (each.path.name, each.mode) != ("edge", 0o710)
    ]


@both_launch_methods
def test_files_of_keeper_and_servers_are_private_to_their_owner(make_keeper, launch_by):
    keeper = with_umask_000(
        make_keeper(launch_by=launch_by, log_max_bytes=1024, probe_period=1)
    ).start()
    # Except what the test created, and what IPython copies with its installed mode,
    # into a directory that is private.
    ipython = keeper.base / ".ipython" / "profile_default"
    others = {keeper.notebook_dir, keeper.config_dir, keeper.base / "bin", keeper.log, ipython}
    server = start_server(keeper, launch_by)
    kernel = start_kernel(server)
    run_cell(server, kernel, "open('made', 'w').close()")
    until((keeper.state_dir / "logs" / "default.log.1").exists, what="the log to be rotated")
    assert accessible_by_others(keeper.base, but=others) == []
    assert accessible_by_others(keeper.notebook_dir) == []
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
    assert accessible_by_others(keeper.base, but=others) == []


def with_umask_000(keeper):
    """Start a keeper from a shell with umask 000."""
    command = keeper.command
    keeper.command = lambda *arguments: [
        "sh",
        "-c",
        'umask 000; exec "$@"',
        "sh",
        *command(*arguments),
    ]
    return keeper


def start_server(keeper, launch_by):
    return forked(keeper) if launch_by == "fork" else keeper.post().json()


@both_launch_methods
def test_umask_setting_applies_to_files_that_servers_create(make_keeper, launch_by):
    keeper = with_umask_000(make_keeper(launch_by=launch_by, umask="022")).start()
    server = start_server(keeper, launch_by)
    kernel = start_kernel(server)
    run_cell(server, kernel, "import os; open('made', 'w').close(); os.mkdir('directory')")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in keeper.notebook_dir.iterdir()}
    assert modes == {"made": 0o644, "directory": 0o755}
    assert run_cell(server, kernel, "print(oct(os.umask(0o022)))").strip() == "0o22"
    # Files that contain secrets stay private.
    assert accessible_by_others(keeper.state_dir) == []


def test_process_1_of_a_container_is_not_readable(passable, user):
    """Its environment is that of the container, including the token."""
    keeper = PassableKeeper(passable / "contained", launch_by="exec", token=KEEPER_SECRETS["token"])
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
            # /proc shows these files as root's only if the process is not dumpable.
            assert Path(f"/proc/{pid}/environ").stat().st_uid == 0
            assert f"Uid:\t{user.pw_uid}" in Path(f"/proc/{pid}/status").read_text()
    finally:
        os.kill(init, 15)
        keeper.process.wait(PATIENCE)
        keeper.http.close()
        keeper.sweep()

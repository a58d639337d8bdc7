"""Forked servers are equivalent to executed ones: as isolated, up to date and supervised."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from harness import (
    PATIENCE,
    KeeperProcess,
    alive,
    everything_below,
    fork_servers_of,
    forked,
    give_hands,
    kill_all,
    parent_of,
    run_cell,
    run_in_server,
    start_kernel,
    until,
    working_in,
)
from memory import OWN_STATE, hidden

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")

REPORT_STATE = """
import atexit, ctypes, gc, hashlib, json, logging, multiprocessing, os, pathlib, random, resource
import secrets, signal, ssl, sys
import tempfile, threading, uuid
import jupyter_server.serverapp

runtime_dir, here = pathlib.Path(os.environ["JUPYTER_RUNTIME_DIR"]), pathlib.Path(__file__).parent
signal.signal(signal.SIGUSR2, lambda *_: os._exit(7))


def end(path=here / "ends" / runtime_dir.parent.name):
    with path.open("a") as ends:
        ends.write("ended\\n")


atexit.register(end)
random_things = {
    "random": [random.random() for _ in range(4)],
    "SystemRandom": random.SystemRandom().random(),
    "uuid1": str(uuid.uuid1()),
    "uuid4": str(uuid.uuid4()),
    "secrets": secrets.token_hex(),
    "urandom": os.urandom(8).hex(),
    "openssl": ssl.RAND_bytes(8).hex(),
    "tempfile": next(tempfile._get_candidate_names()),
    "multiprocessing": multiprocessing.current_process().authkey.hex(),
}
if "numpy" in sys.modules:
    import numpy
    random_things["numpy"] = numpy.random.random(4).tolist()


def kind(path):
    target = os.readlink(path)
    if target.startswith("/"):
        return target.replace(runtime_dir.parent.name + ".log", "ITS.log")
    return target.partition(":")[0]


def named(handler):
    return getattr(handler, "__qualname__", None) or str(handler)


def state():
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
    prctl = ctypes.CDLL(None).prctl
    flag = ctypes.c_int()
    prctl(37, ctypes.byref(flag))
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return {
        "status": {name: status[name] for name in
                   ("Name", "Umask", "Uid", "Gid", "Groups", "Threads", "SigPnd", "ShdPnd",
                    "SigBlk", "SigIgn", "SigCgt", "CapEff", "NoNewPrivs", "Seccomp")},
        "handlers": {str(number): named(signal.getsignal(number))
                     for number in signal.valid_signals()},
        "wakeup": wakeup >= 0,
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "subreaper": flag.value,
        "tasks": len(os.listdir("/proc/self/task")),
        "threads": [thread.name for thread in threading.enumerate()],
        "files": sorted(kind(fd) for fd in list(pathlib.Path("/proc/self/fd").iterdir())
                        if os.path.lexists(fd)),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource)
                   if name.startswith("RLIMIT")},
        "session": os.getsid(0) == os.getpid() == os.getpgrp(),
        "cwd": os.getcwd(),
        "argv": sys.argv,
        "path": sys.path,
        "flags": str(sys.flags),
        "gc": [gc.isenabled(), gc.get_threshold()],
        "streams": [(stream.encoding, stream.errors, stream.line_buffering)
                    for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "handlers of logs": {name: [type(handler).__name__ for handler in logger.handlers]
                             for name, logger in [("", logging.root),
                                                  *logging.root.manager.loggerDict.items()]
                             if getattr(logger, "handlers", None)},
        "level": logging.root.level,
        "nice": os.nice(0),
        "oom": open("/proc/self/oom_score_adj").read(),
        "temporary": tempfile.gettempdir(),
    }


early = state()


def start_ioloop(app, start=jupyter_server.serverapp.ServerApp.start_ioloop):
    def tell():
        told = {"early": early, "late": state(), "random": random_things,
                "environ": dict(os.environ),
                "cookie": hashlib.sha256(app.cookie_secret).hexdigest(),
                "token": app.identity_provider.token}
        os.close(os.open(runtime_dir / "told.new", os.O_CREAT, 0o600))
        (runtime_dir / "told.new").write_text(json.dumps(told))
        (runtime_dir / "told.new").rename(runtime_dir / "told")
    app.io_loop.add_callback(tell)
    start(app)


jupyter_server.serverapp.ServerApp.start_ioloop = start_ioloop
c.ServerApp.jpserver_extensions = {"hands": True}
"""
SETTINGS = "settings/@jupyterlab/notebook-extension:tracker"
USER_DIRECTORIES = (
    "HOME",
    "XDG_DATA_HOME",
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR",
)
"""Variables that name directories of a user."""
KEEPER_ENV = {"USER": "earlier-user", "LOGNAME": "earlier-user", "TZ": "America/Lima"}
REQUEST_ENV = {"USER": "another", "LOGNAME": "another", "TZ": "Asia/Kathmandu"}
MUST_DIFFER = {"JUPYTER_RUNTIME_DIR", "LABKEEPER_SERVER", "LC_LABKEEPER", "JUPYTER_SERVER_URL"}


@contextlib.contextmanager
def keepers(base):
    """Yield a factory of keepers that are closed at the end; files left after a clean exit fail."""
    made = []

    def make(name, **settings):
        made.append(KeeperProcess(base / name, **{"launch_by": "fork"} | settings))
        return made[-1]

    try:
        yield make
    finally:
        for keeper in made:
            keeper.close()


@pytest.fixture
def make_keeper(make_keeper):
    return lambda **settings: make_keeper(**{"launch_by": "fork"} | settings)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A keeper whose servers report their own state; no test may harm it."""
    with keepers(tmp_path_factory.mktemp("shared")) as make:
        keeper = make("keeper")
        (keeper.config_dir / "ends").mkdir()
        give_hands(keeper)
        keeper.configure_jupyter(REPORT_STATE)
        places = {name: keeper.base / f"earlier-{name}" for name in USER_DIRECTORIES}
        for place in places.values():
            # Without a home directory, IPython creates a temporary one for each kernel
            # and never removes it.
            place.mkdir()
        keeper.variables.update(KEEPER_ENV | places)
        yield keeper.start()


@pytest.fixture(scope="module")
def servers(shared):
    """Two servers forked from the same fork server, and one executed server."""
    found = {name: forked(shared, name) for name in ("one", "two")}
    found["executed"] = shared.post(name="executed", env={"LC_LABKEEPER": "1"}).json()
    return found


@pytest.fixture(scope="module")
def reports(shared, servers):
    return {
        name: json.loads(
            until(lambda name=name: read_if_present(shared.server_dirs / name / "jupyter" / "told"))
        )
        for name in servers
    }


def read_if_present(path):
    return path.exists() and path.read_text()


# Siblings


def test_servers_report_whether_they_were_forked(servers):
    assert parent_of(servers["one"]) == parent_of(servers["two"])
    assert [(server["launched_by"], server["exec_reason"]) for server in servers.values()] == [
        ("fork", None),
        ("fork", None),
        ("exec", "the environment variable LC_LABKEEPER takes effect only when a program starts"),
    ]


def test_forked_siblings_share_no_random_numbers_or_secrets(servers, reports):
    for what in reports["one"]["random"]:
        values = {json.dumps(each["random"][what]) for each in reports.values()}
        assert len(values) == 3, what
    for secret in ("cookie", "token"):
        assert len({each[secret] for each in reports.values()}) == 3
    assert {name: each["token"] for name, each in reports.items()} == {
        name: server["token"] for name, server in servers.items()
    }


def with_token(server):
    """Return the address of a Lab's page at its own port."""
    return f"{server['url']}lab?token={server['token']}"


def test_siblings_have_their_own_kernel_keys_and_xsrf_cookies(servers):
    kernels = {name: start_kernel(server) for name, server in servers.items()}
    assert len(set(kernels.values())) == 3
    keys = {
        run_cell(
            server, kernels[name], "import ipykernel; open(ipykernel.get_connection_file()).read()"
        )
        for name, server in servers.items()
    }
    assert len(keys) == 3
    cookies = set()
    for server in servers.values():
        with httpx.Client(trust_env=False) as browser:
            browser.get(with_token(server), follow_redirects=True).raise_for_status()
            cookies.add(browser.cookies["_xsrf"])
    assert len(cookies) == 3


def test_login_cookie_is_not_accepted_by_a_sibling(servers):
    with httpx.Client(trust_env=False) as browser:
        browser.get(with_token(servers["one"]), follow_redirects=True).raise_for_status()
        names = {"one": servers["one"]["port"], "two": servers["two"]["port"]}
        stolen = {
            cookie.name.replace(str(names["one"]), str(names["two"])): cookie.value
            for cookie in browser.cookies.jar
        }
    response = httpx.get(f"{servers['two']['url']}api/status", cookies=stolen, trust_env=False)
    assert response.status_code == 403


def test_each_server_has_its_own_environment(shared, servers, reports):
    same = [
        {name: value for name, value in each["environ"].items() if name not in MUST_DIFFER}
        for each in reports.values()
    ]
    assert same[0] == same[1] == same[2]
    for name, each in reports.items():
        text = json.dumps(each["environ"])
        assert not [other for other in servers.values() if other["token"] in text]
        assert shared.token not in text
        assert each["environ"]["JUPYTER_RUNTIME_DIR"] == str(shared.server_dirs / name / "jupyter")


@pytest.mark.parametrize("moment", ["early", "late"])
def test_forked_server_has_the_same_process_state_as_an_executed_one(reports, moment):
    one, executed = dict(reports["one"][moment]), dict(reports["executed"][moment])
    # It has a connection to the zygote of its kernels, too.
    executed["files"] = sorted([*executed["files"], "socket"])
    assert {what: value for what, value in one.items() if value != executed[what]} == {}
    assert one["session"]
    assert one["argv"] == ["jupyter-lab"]


def test_forked_server_is_in_the_same_control_groups_as_an_executed_one(servers):
    def groups(name):
        return Path(f"/proc/{servers[name]['pid']}/cgroup").read_text().replace(name, "NAME")

    # A server is moved to its group while it starts.
    until(lambda: groups("one") == groups("executed"), what="both to have the same control groups")


def test_servers_and_kernels_are_oom_killed_before_keeper_and_fork_server(shared, servers):
    def score(pid):
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    kernel = int(run_cell(servers["one"], start_kernel(servers["one"]), "import os; os.getpid()"))
    ours = score(shared.process.pid)
    assert score(parent_of(servers["one"])) == ours
    assert {score(pid) for pid in (kernel, *(server["pid"] for server in servers.values()))} == {
        max(ours, 300)
    }


def test_atexit_hook_runs_once_and_only_in_its_own_server(shared):
    server = forked(shared, "ends")
    ends = shared.config_dir / "ends"
    assert shared.delete("ends").json()["stop_report"]["method"] == "shutdown"
    assert (ends / "ends").read_text() == "ended\n"
    assert not alive(server["pid"])
    # Neither the rehearsal nor the fork server ran it.
    place = next((shared.server_dirs / ".forkservers").iterdir())
    assert not (ends / place.name).exists()


def test_response_has_the_same_fields_for_forked_and_executed_servers(servers):
    one, executed = servers["one"], servers["executed"]
    assert one.keys() == executed.keys()
    kinds = [
        {field: type(value) for field, value in each.items() if field != "exec_reason"}
        for each in (one, executed)
    ]
    assert kinds[0] == kinds[1]


POOL = """
import concurrent.futures, multiprocessing, operator
for method in ("spawn", "forkserver"):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        assert pool.submit(operator.add, 1, 2).result() == 3
"""


@pytest.mark.parametrize("name", ["one", "executed"])
def test_extension_can_use_a_process_pool(servers, name):
    """Both start methods run the main module again."""
    run_in_server(servers[name], POOL)


PORTS = """
import socket, zmq
from jupyter_client.connect import LocalPortCache

ports = LocalPortCache.instance()
given, back = (ports.find_available_port("127.0.0.1") for _ in range(2))
ports.return_port(back)
with socket.socket() as other:
    try:
        other.bind(("127.0.0.1", given))
    except OSError:
        other.bind(("127.0.0.1", back))
    else:
        raise AssertionError("another program could bind the port")
with zmq.Context() as context, context.socket(zmq.ROUTER) as kernel:
    kernel.bind(f"tcp://127.0.0.1:{given}")
ports.return_port(given)
"""


@pytest.mark.parametrize("name", ["one", "executed"])
def test_port_chosen_for_a_kernel_stays_reserved(servers, name):
    """Otherwise another program may bind it before the kernel does, and the kernel exits."""
    run_in_server(servers[name], PORTS)


FIND_LATE_MODULES = """
import gc, sys

# Objects that were frozen before the fork are in no generation of the collector.
since = {id(found) for found in gc.get_objects()}
ours = {name: module for name, module in sys.modules.items()
        if name.startswith("labkeeper_forkserver.")}
expected = {f"labkeeper_forkserver.{name}" for name in
            ("app", "extension", "kernels", "npm", "patches", "websockets")}
assert expected <= ours.keys(), list(ours)
late = [name for name, module in ours.items() if id(vars(module)) in since]
assert (late != []) is @late@, late
"""


@pytest.mark.parametrize(("name", "late"), [("one", False), ("executed", True)])
def test_fork_server_preloads_the_modules_of_labkeeper_too(servers, name, late):
    run_in_server(servers[name], FIND_LATE_MODULES.replace("@late@", str(late)))


ATTACHED = {
    "run": (["run", "--existing", "@connection@"], "print('6 * 7 =', 6 * 7)"),
    "console": (
        ["console", "--simple-prompt", "--no-confirm-exit", "--existing", "@connection@"],
        "print('6 * 7 =', 6 * 7)\nexit\n",
    ),
}
"""Commands that attach to a running kernel, and their input."""


@pytest.mark.parametrize("name", ["one", "executed"])
@pytest.mark.parametrize("command", ATTACHED)
def test_console_can_attach_to_a_kernel(shared, servers, name, command):
    kernel = start_kernel(servers[name])
    # A console that attaches while the kernel starts may miss the "idle" status of its cell,
    # and wait for it forever.
    assert run_cell(servers[name], kernel, "1 + 1") == "2"
    connection = str(shared.server_dirs / name / "jupyter" / f"kernel-{kernel}.json")
    arguments, stdin = ATTACHED[command]
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "jupyter",
            *(piece.replace("@connection@", connection) for piece in arguments),
        ],
        env=shared.environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "6 * 7 = 42" in answer.stdout, answer.stderr
    # The kernel is still usable.
    assert run_cell(servers[name], kernel, "1 + 1") == "2"


@pytest.mark.parametrize("name", ["PYTHONPATH", "LC_ALL"])
def test_variables_read_at_interpreter_startup_force_an_exec(shared, name):
    value = {"PYTHONPATH": "/some/where", "LC_ALL": "C"}[name]
    server = shared.post(name="other", env={name: value}).json()
    assert server["launched_by"] == "exec"
    assert name in server["exec_reason"]
    facts = json.loads(
        until(lambda: read_if_present(shared.server_dirs / "other" / "jupyter" / "told"))
    )
    assert facts["environ"][name] == value
    assert name != "PYTHONPATH" or value in facts["early"]["path"]
    assert shared.delete("other").status_code == 200


def test_tmpdir_of_the_request_is_used(shared, tmp_path):
    forked(shared, "temporary", env={"TMPDIR": str(tmp_path), "TZ": "Asia/Kathmandu"})
    facts = json.loads(
        until(lambda: read_if_present(shared.server_dirs / "temporary" / "jupyter" / "told"))
    )
    assert facts["early"]["temporary"] == str(tmp_path)
    assert shared.delete("temporary").status_code == 200


def test_lab_workspaces_and_settings_follow_the_servers_environment(shared, servers, tmp_path):
    """The fork server determined these directories earlier, from a different environment."""
    other = forked(shared, "elsewhere", env={"JUPYTER_CONFIG_DIR": str(tmp_path)})
    for server, directory in ((servers["one"], shared.config_dir), (other, tmp_path)):
        for what, content in (
            ("workspaces/mine", {"data": {}, "metadata": {"id": "mine"}}),
            (SETTINGS, {"raw": "{}"}),
        ):
            answer = httpx.put(
                f"{server['url']}lab/api/{what}",
                headers={"Authorization": f"token {server['token']}"},
                json=content,
                trust_env=False,
            )
            assert answer.status_code == 204, answer.text
        kept = [found.path for found in everything_below(directory / "lab") if found.path.is_file()]
        assert {path.name.partition("-")[0] for path in kept} == {"mine", "tracker.jupyterlab"}
    assert shared.delete("elsewhere").status_code == 200


FIND_EARLIER_VALUES = (
    OWN_STATE
    + """
import json, re
found = {name: repr(text) for name, text in own_state() if re.search("@earlier@", str(text))}
with open("found", "w") as file:
    json.dump(found, file)
"""
).replace("@earlier@", "|".join(map(hidden, ("earlier-", "America/Lima", "/.forkservers/"))))
EXPECTED_MODULES = {"rich", "wsgiref.handlers"}
"""Modules that store a directory for tracebacks, or the environment of an unused WSGI server."""


def test_no_module_keeps_the_user_or_directories_of_the_fork_server(shared, tmp_path):
    """Whatever a module derives from these at import must be recomputed: standalone/renewal.py."""
    (tmp_path / "HOME").mkdir()
    elsewhere = forked(
        shared,
        "elsewhere",
        env=REQUEST_ENV | {name: str(tmp_path / name) for name in USER_DIRECTORIES},
    )
    run_in_server(elsewhere, FIND_EARLIER_VALUES)
    found = json.loads((shared.notebook_dir / "found").read_text())
    assert {name: text for name, text in found.items() if name not in EXPECTED_MODULES} == {}
    # The most important case: a deleted file goes to the trash of the server's user.
    answer = httpx.delete(
        f"{elsewhere['url']}api/contents/found",
        headers={"Authorization": f"token {elsewhere['token']}"},
        trust_env=False,
    )
    assert answer.status_code == 204, answer.text
    assert (tmp_path / "XDG_DATA_HOME" / "Trash" / "files" / "found").exists()
    assert shared.delete("elsewhere").status_code == 200


# Safety


def test_fork_server_files_are_private_and_tokens_are_not_exposed(shared, servers):
    place = next((shared.server_dirs / ".forkservers").iterdir())
    for path in (place, *place.parents[:2]):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {
        "socket": 0o600,
        "rehearsal.json": 0o600,
    }
    secrets = [server["token"] for server in servers.values()] + [shared.token]
    for pid in (parent_of(servers["one"]), *(server["pid"] for server in servers.values())):
        for shown in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{shown}").read_text(errors="replace")
            assert not [secret for secret in secrets if secret in text], (pid, shown)
    for found in (
        *everything_below(shared.server_dirs),
        *everything_below(shared.state_dir / "logs"),
    ):
        if any(secret.encode() in found.content for secret in secrets):
            assert found.mode & 0o077 == 0, found.path
            assert found.path.suffix != ".log", found.path


CONNECT_TO_FORK_SERVER = """
import json, os, socket, struct, sys
place = [entry.path for entry in os.scandir({place!r})][0]
connection = socket.socket(socket.AF_UNIX)
os.chdir(place)
connection.connect("socket")
body = json.dumps({message!r}).encode()
try:
    connection.sendall(struct.pack("!I", len(body)) + body)
    print(connection.recv(100))
except ConnectionError:
    print(b"")
"""
INTRUDERS = {
    "a cell": "exec({source!r})",
    "a program": "import subprocess, sys\n"
    "print(subprocess.run([sys.executable, '-c', {source!r}],"
    " capture_output=True).stdout.decode())",
    "a program that hides": "import subprocess, sys\n"
    "print(subprocess.run(['/usr/bin/setsid', sys.executable, '-c', {source!r}],"
    " env={{}}, capture_output=True).stdout.decode())",
}


@pytest.mark.parametrize("intruder", INTRUDERS)
@pytest.mark.parametrize("name", ["one", "executed"])
def test_fork_server_rejects_requests_from_inside_a_server(shared, servers, name, intruder):
    parent = parent_of(servers["one"])
    kernel = start_kernel(servers[name])
    for message in ({"do": "keep"}, {"do": "retire"}):
        source = CONNECT_TO_FORK_SERVER.format(
            place=str(shared.server_dirs / ".forkservers"), message=message
        )
        assert (
            run_cell(servers[name], kernel, INTRUDERS[intruder].format(source=source)).strip()
            == "b''"
        )
    assert parent_of(forked(shared, "after")) == parent
    assert shared.delete("after").status_code == 200


# End of the fork server


def test_failed_rehearsal_ends_at_once(make_keeper):
    """Otherwise all servers would be executed until the rehearsal times out."""
    keeper = make_keeper()
    keeper.configure_jupyter(
        "import asyncio\nasync def broken(*_, **__):\n    raise OSError('broken')\n"
        "asyncio.open_connection = broken"
    )
    keeper.start()
    until(
        lambda: "the rehearsal of a server failed" in keeper.log.read_text(),
        what="the log line about the failed rehearsal",
    )
    server = keeper.post().json()
    assert (server["state"], server["launched_by"]) == ("running", "exec")


@pytest.mark.promise
def test_servers_survive_a_killed_fork_server(make_keeper):
    keeper = make_keeper().start()
    keeper.configure_jupyter(
        "import os, signal\nsignal.signal(signal.SIGUSR2, lambda *_: os._exit(7))"
    )
    old = forked(keeper, "old")
    kernel = start_kernel(old)
    run_cell(old, kernel, "x = 42")
    killed = parent_of(old)
    os.kill(killed, signal.SIGKILL)
    at_once = keeper.post(name="at-once")
    assert (at_once.status_code, at_once.json()["state"]) == (201, "running")
    assert keeper.get("old")["pid"] == old["pid"]
    assert run_cell(old, kernel, "x") == "42"
    report = keeper.delete("old").json()["stop_report"]
    assert (report["method"], report["kernels_stopped"]) == ("shutdown", [kernel])

    new = forked(keeper, "new")
    assert parent_of(new) != killed
    # The exit status of each server is known.
    for number, end in ((signal.SIGSEGV, "killed by SIGSEGV"), (signal.SIGUSR2, "exit code 7")):
        running = keeper.wait_for("running", "new")
        os.kill(running["pid"], number)
        assert exit_cause(keeper, running) == end


def exit_cause(keeper, server):
    """Return how a launch ended according to the keeper's log.

    The API no longer reports it once the server has been launched again.
    """
    generation = (server["name"], server["generation"])

    def cause():
        lines = [
            json.loads(line) for line in keeper.log.read_text().splitlines() if line.startswith("{")
        ]
        causes = [
            line["cause"]
            for line in lines
            if (line.get("server"), line.get("generation")) == generation and "cause" in line
        ]
        return causes and causes[0]

    return re.search(r"\((.*?)\)", until(cause, what="the server's exit status in the log"))[1]


def test_suspended_fork_server_is_replaced_and_the_server_executed(make_keeper):
    keeper = make_keeper().start()
    server = forked(keeper)
    suspended = parent_of(server)
    os.kill(suspended, signal.SIGSTOP)
    answer = keeper.post(name="other")
    assert (answer.status_code, answer.json()["launched_by"]) == (201, "exec")
    assert "did not answer" in answer.json()["exec_reason"]
    assert not alive(suspended)
    assert keeper.get()["pid"] == server["pid"]
    assert parent_of(forked(keeper, "third")) != suspended


BROKEN = (
    '#!/bin/sh\ncase "$*" in *" fork "*) echo it is broken >&2; exit 3;; esac\n'
    'exec "{python}" "$@"\n'
)


def test_servers_are_executed_with_a_reason_if_there_is_no_fork_server(make_keeper, tmp_path):
    python = tmp_path / "python3"
    python.write_text(BROKEN.format(python=sys.executable))
    python.chmod(0o755)
    broken, off = make_keeper(jupyter_python=python).start(), make_keeper(launch_by="exec").start()
    answers = [keeper.post() for keeper in (broken, off)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert [answer.json()["launched_by"] for answer in answers] == ["exec", "exec"]
    # The reason depends on the moment, since the fork server is started again and again.
    assert re.match(
        "the fork server (has died|has only begun to load|takes long to load)",
        answers[0].json()["exec_reason"],
    )
    assert "the fork server has died" in until(
        lambda: "there is no fork server" in (log := broken.log.read_text()) and log
    )
    assert answers[1].json()["exec_reason"] == "forking is turned off (LABKEEPER_LAUNCH_BY=exec)"
    assert "it is broken" in (broken.state_dir / "logs" / "_forkserver.log").read_text()
    assert not (off.server_dirs / ".forkservers").exists()


def test_progress_of_a_start_says_why_the_server_is_executed(make_keeper, tmp_path):
    hangs = tmp_path / "hangs"
    hangs.touch()
    keeper = make_keeper(launch_by="exec").start()
    keeper.configure_jupyter(
        f"import os, time\nwhile os.path.exists({str(hangs)!r}): time.sleep(0.05)"
    )
    assert keeper.post("?wait=0").status_code == 202
    progress = until(
        lambda: (server := keeper.get())["state"] == "starting" and server["progress"],
        what="the progress of the start",
    )
    reason = "forking is turned off (LABKEEPER_LAUNCH_BY=exec)"
    assert progress == {
        "stage": "starting",
        "message": f"JupyterLab is loaded by a new process: {reason}",
    }
    hangs.unlink()
    server = keeper.wait_for("running")
    assert (server["progress"], server["exec_reason"]) == (None, reason)


# End of the keeper


def test_next_keeper_adopts_a_current_fork_server_and_retires_a_stale_one(make_keeper):
    keeper = make_keeper().start()
    servers = {name: forked(keeper, name) for name in ("lives", "dies", "gone")}
    parent = parent_of(servers["lives"])
    keeper.kill()
    os.kill(servers["gone"]["pid"], signal.SIGABRT)
    until(lambda: not alive(servers["gone"]["pid"]))
    keeper.start()
    assert keeper.wait_for("running", "lives")["pid"] == servers["lives"]["pid"]
    assert keeper.get("lives")["launched_by"] == "fork"
    assert exit_cause(keeper, servers["gone"]) == "killed by SIGABRT"
    os.kill(servers["dies"]["pid"], signal.SIGSEGV)
    assert exit_cause(keeper, servers["dies"]) == "killed by SIGSEGV"
    assert parent_of(forked(keeper, "new")) == parent
    assert len(list((keeper.server_dirs / ".forkservers").iterdir())) == 1

    # Now stale, it forks no more servers and exits with the last of its own.
    keeper.kill()
    keeper.variables["JUPYTER_COLOUR"] = "blue"
    keeper.start()
    newest = forked(keeper, "newest")
    assert parent_of(newest) != parent
    assert alive(parent)
    for name in ("lives", "dies", "gone", "new"):
        assert keeper.delete(name).status_code == 200
    until(lambda: not alive(parent), what="the stale fork server to exit after its last server")
    until(
        lambda: len(list((keeper.server_dirs / ".forkservers").iterdir())) == 1,
        what="the stale fork server's directory to be removed",
    )


def test_shutdown_leaves_no_fork_server_behind(make_keeper):
    """Not even a retired one, whose last server ends during the shutdown."""
    keeper = make_keeper().start()
    server = forked(keeper)
    (keeper.config_dir / "jupyter_server_config.json").write_text("{}")
    second = forked(keeper, "second")
    parents = {parent_of(server), parent_of(second)}
    assert len(parents) == 2
    assert keeper.stop() == 0
    assert not [pid for pid in parents if alive(pid)]
    assert not keeper.in_server_dirs()


@pytest.fixture(scope="module")
def abandoned(tmp_path_factory):
    """Two killed keepers, one without servers and one with some, left alone during other tests."""
    with keepers(tmp_path_factory.mktemp("abandoned")) as make:
        idle, busy = make("idle").start(), make("busy").start()
        servers = {name: forked(busy, name) for name in ("first", "second", "last")}
        pid = until(lambda: fork_servers_of(idle))[0].pid
        until(lambda: "the fork server is ready" in idle.log.read_text())
        idle.kill()
        busy.kill()
        yield idle, pid, busy, servers
        kill_all([*working_in(idle.server_dirs), *working_in(busy.server_dirs)])


@pytest.fixture(autouse=True, scope="module")
def _start_abandoned_early(abandoned):
    """Start the keepers first, so that their fork servers time out while other tests run."""


def test_fork_server_without_keeper_or_servers_exits(abandoned):
    idle, pid, *_ = abandoned
    until(lambda: not alive(pid), what="the fork server to exit")
    assert not list((idle.server_dirs / ".forkservers").iterdir())


def test_exit_cause_of_a_server_is_known_long_after_the_keeper_was_killed(abandoned):
    """It is kept by the fork server, which lives on at least as long as its last server."""
    _, pid, busy, servers = abandoned
    ended = [servers[name] for name in ("first", "second")]
    until(lambda: not alive(pid), what="the idle fork server to give up on its keeper")
    for server, number in zip(ended, (signal.SIGSEGV, signal.SIGABRT), strict=True):
        os.kill(server["pid"], number)
        until(lambda server=server: not alive(server["pid"]))
    busy.start()
    try:
        assert [exit_cause(busy, server) for server in ended] == [
            "killed by SIGSEGV",
            "killed by SIGABRT",
        ]
        assert busy.get("last")["pid"] == servers["last"]["pid"]
    finally:
        busy.stop()


# Changes on disk

EXTENSION = """
import os, pathlib, threading
version = {version}
with open({imports!r}, "a") as imports:
    imports.write(f"{{os.getpid()}} {{version}}\\n")
{more}
def _jupyter_server_extension_points():
    return [{{"module": __name__}}]
def _load_jupyter_server_extension(app):
    pathlib.Path(os.environ["JUPYTER_RUNTIME_DIR"], __name__).write_text(
        f"{{version}} {{threading.active_count()}}"
    )
"""


class Site:
    """A keeper with its own directory of packages."""

    def __init__(self, keeper):
        self.keeper = keeper
        self.packages = keeper.base / "site"
        self.packages.mkdir()
        keeper.variables["PYTHONPATH"] = self.packages
        # Without bytecode, which has its own modification time and is not the subject here.
        keeper.variables["PYTHONDONTWRITEBYTECODE"] = "1"
        self.enabled = keeper.config_dir / "jupyter_server_config.d"
        self.enabled.mkdir()
        (keeper.base / "imports").touch()

    def install(self, name, version, more="", modules=()):
        package = self.packages / name
        package.mkdir(exist_ok=True)
        for module in modules:
            (package / f"{module}.py").write_text("")
        source = EXTENSION.format(
            version=version, imports=str(self.keeper.base / "imports"), more=more
        )
        (package / "new").write_text(
            source + "".join(f"from . import {module}\n" for module in modules)
        )
        (package / "new").replace(package / "__init__.py")

    def enable(self, name):
        (self.enabled / f"{name}.json").write_text(
            json.dumps({"ServerApp": {"jpserver_extensions": {name: True}}})
        )

    def loaded(self, server, extension):
        return until(
            lambda: read_if_present(
                self.keeper.server_dirs / server["name"] / "jupyter" / extension
            )
        )

    def imported_by(self):
        return [
            tuple(line.split()) for line in (self.keeper.base / "imports").read_text().splitlines()
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with keepers(tmp_path_factory.mktemp("site")) as make:
        found = Site(make("keeper"))
        found.install("alpha", 1)
        found.enable("alpha")
        found.keeper.start()
        yield found


def test_installed_changes_take_effect_in_the_next_server(site):
    keeper = site.keeper
    before = forked(keeper, "before")
    assert site.loaded(before, "alpha").startswith("1 ")
    site.install("alpha", 2)
    at_once = keeper.post(name="at-once").json()
    assert site.loaded(at_once, "alpha").startswith("2 ")
    later = forked(keeper, "later")
    assert site.loaded(later, "alpha").startswith("2 ")
    assert parent_of(later) != parent_of(before)
    importers = site.imported_by()
    assert (str(parent_of(before)), "1") in importers
    assert (str(parent_of(later)), "2") in importers
    assert not {str(before["pid"]), str(later["pid"])} & {pid for pid, _ in importers}
    # A newly enabled extension is in the next server, and preloaded by the next fork server.
    site.install("beta", 1)
    site.enable("beta")
    assert site.loaded(keeper.post(name="enabled").json(), "beta").startswith("1 ")
    last = forked(keeper, "last")
    assert site.loaded(last, "beta").startswith("1 ")
    assert str(last["pid"]) not in {pid for pid, _ in site.imported_by()}


UNSAFE_EXTENSIONS = {
    "thread": ("threading.Thread(target=threading.Event().wait, daemon=True).start()", ()),
    "program": ("import subprocess; own = subprocess.Popen(['sleep', '300'])", ()),
    "loop": ("import asyncio; loop = asyncio.new_event_loop()", ("inner",)),
    "many": ("import socket; own = socket.socket()", tuple(f"part{number}" for number in range(8))),
}


@pytest.mark.parametrize("name", UNSAFE_EXTENSIONS)
def test_extension_that_is_unsafe_to_fork_is_loaded_by_each_server(site, name):
    keeper = site.keeper
    more, modules = UNSAFE_EXTENSIONS[name]
    site.install(name, 1, more, modules)
    site.enable(name)
    try:
        # The disk has changed: until the next fork server is ready, servers are executed.
        server = forked(keeper, f"s-{name}")
        assert site.loaded(server, name) == ("1 2" if name == "thread" else "1 1")
        parent = parent_of(server)
        assert len(list(Path(f"/proc/{parent}/task").iterdir())) == 1
        kernel = start_kernel(server)
        assert run_cell(server, kernel, "1+1") == "2"
        # The server imported the module itself: the fork server tried, then restarted without it.
        assert str(server["pid"]) in {pid for pid, _ in site.imported_by()}
    finally:
        (site.enabled / f"{name}.json").unlink()
        keeper.delete(f"s-{name}", force="true")

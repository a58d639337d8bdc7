"""Kernels are forked unless they would differ from an executed one; their servers say why not."""

from __future__ import annotations

import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from harness import (
    alive,
    forked,
    kernel_websocket,
    parent_of,
    run_cell,
    send_cell,
    start_kernel,
    until,
)
from kernel_processes import (
    ForkingKeeper,
    ask,
    delete_servers,
    find_loader,
    fork_kernel,
    launched,
    pid_of,
    processes_of,
    ready_to_fork,
    zygote_of,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")

LAUNCHER = ("-m", "ipykernel_launcher", "-f", "{connection_file}")
MIB = 2**20


@pytest.fixture(scope="module")
def _started(tmp_path_factory):
    keeper = ForkingKeeper(tmp_path_factory.mktemp("forked-kernels") / "keeper", usage_period=0.5)
    keeper.variables["LANG"] = "C.UTF-8"
    try:
        yield keeper.start_to_fork()
    finally:
        keeper.close()


@pytest.fixture
def keeper(_started):
    yield _started
    delete_servers(_started)


# Reasons

NOT_LOADED = "ipykernel of {} is not loaded yet"
AT_START = "the environment variable {} takes effect only when a program starts"


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("OMP_NUM_THREADS", "3", "os.environ['OMP_NUM_THREADS']"),
        ("LANG", "POSIX", "os.environ['LANG']"),
        ("PYTHONPATH", "/of/kernels", "next(place for place in sys.path if '/of/' in place)"),
    ],
)
def test_kernel_with_a_variable_that_is_read_at_start_is_executed(keeper, name, value, seen):
    server = ready_to_fork(keeper, kernel_env={name: value, "HARMLESS": "1"})
    kernel = start_kernel(server)
    assert launched(server, kernel) == ("exec", AT_START.format(name))
    assert run_cell(server, kernel, f"import os, sys; print({seen}, end='')") == value


def test_kernel_with_other_variables_is_forked(keeper):
    server = ready_to_fork(keeper, env={"OF_SERVER": "a"}, kernel_env={"OF_KERNELS": "b"})
    kernel, _ = fork_kernel(server)
    source = "import os; print(os.environ['OF_SERVER'], os.environ['OF_KERNELS'])"
    assert run_cell(server, kernel, source).split() == ["a", "b"]


def test_kernel_without_a_notebook_is_forked_into_the_root_directory(keeper):
    server = ready_to_fork(keeper)
    kernel = ask(server, "POST", "kernels", name="python3")["id"]
    assert launched(server, kernel) == ("fork", None)
    assert run_cell(server, kernel, "import os; print(os.getcwd(), end='')") == server["root_dir"]


def make_venv(directory):
    """Create an environment with the packages of this one; return its interpreter."""
    builder = venv.EnvBuilder(symlinks=True)
    builder.create(directory)
    context = builder.ensure_directories(directory)
    place = sysconfig.get_path(
        "purelib", "venv", vars={"base": context.env_dir, "platbase": context.env_dir}
    )
    Path(place, "packages.pth").write_text(sysconfig.get_path("purelib"))
    return context.env_exe


def wrapped(directory):
    """Create a program that starts this interpreter."""
    program = directory / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("make", [make_venv, wrapped])
def test_kernel_of_another_interpreter_is_executed_by_it(keeper, tmp_path, make):
    """An environment differs by the place of its interpreter, not by the file it is a link to."""
    interpreter = make(tmp_path)
    keeper.install_kernelspec("other", [interpreter, *LAUNCHER])
    server = ready_to_fork(keeper)
    kernel = start_kernel(server, "other")
    assert launched(server, kernel) == ("exec", NOT_LOADED.format(interpreter))
    prefix = str(tmp_path) if make is make_venv else sys.prefix
    assert run_cell(server, kernel, "import sys; print(sys.prefix, end='')") == prefix


def test_kernel_of_the_same_interpreter_under_another_name_is_forked(keeper):
    names = {Path(sys.executable).with_name(f"python{suffix}") for suffix in ("", "3")}
    server = ready_to_fork(keeper)
    for number, name in enumerate(path for path in names if path.exists()):
        keeper.install_kernelspec(f"same{number}", [name, *LAUNCHER], env={"NUMBER": str(number)})
        kernel, _ = fork_kernel(server, name=f"same{number}")
        assert run_cell(server, kernel, "import os; os.environ['NUMBER']") == f"'{number}'"


def test_kernel_that_is_no_ipython_kernel_is_executed(keeper, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import ipykernel.kernelapp\nipykernel.kernelapp.IPKernelApp.launch_instance()\n"
    )
    keeper.install_kernelspec("program", [sys.executable, program, "-f", "{connection_file}"])
    server = ready_to_fork(keeper)
    kernel = start_kernel(server, "program")
    assert launched(server, kernel) == ("exec", "it is no IPython kernel")
    assert run_cell(server, kernel, "import sys; print(sys.argv[0], end='')") == str(program)


def test_kernel_with_an_option_of_the_interpreter_is_executed(keeper):
    keeper.install_kernelspec("optimized", [sys.executable, "-O", *LAUNCHER])
    server = ready_to_fork(keeper)
    kernel = start_kernel(server, "optimized")
    assert launched(server, kernel) == ("exec", NOT_LOADED.format(f"{sys.executable} -O"))
    assert run_cell(server, kernel, "__debug__") == "False"


def test_kernel_with_options_of_ipykernel_is_forked_with_them(keeper):
    option = "--IPKernelApp.exec_lines=chosen = 42"
    keeper.install_kernelspec("chosen", [sys.executable, *LAUNCHER, option])
    server = ready_to_fork(keeper)
    kernel, _ = fork_kernel(server, name="chosen")
    assert run_cell(server, kernel, "chosen") == "42"


def test_kernelspec_keeps_the_provisioner_that_it_names(keeper):
    keeper.install_kernelspec(
        "provisioned",
        [sys.executable, *LAUNCHER],
        metadata={"kernel_provisioner": {"provisioner_name": "local-provisioner"}},
    )
    server = ready_to_fork(keeper)
    kernel = start_kernel(server, "provisioned")
    assert launched(server, kernel) == ()
    assert psutil.Process(pid_of(server, kernel)).ppid() == server["pid"]
    (listed,) = keeper.http.get("/api/servers/default/kernels").json()["kernels"]
    assert (listed["launched_by"], listed["exec_reason"]) == (None, None)


def test_kernels_of_an_executed_server_are_executed(keeper):
    server = keeper.post(env={"LC_LABKEEPER": "1"}).json()
    assert server["launched_by"] == "exec"
    assert launched(server, start_kernel(server)) == ("exec", "the server itself was executed")


def test_kernels_of_a_server_that_chose_so_are_executed(keeper):
    server = forked(keeper, kernels_by="exec")
    kernel = start_kernel(server)
    reason = "forking kernels is turned off (kernels_by=exec)"
    assert launched(server, kernel) == ("exec", reason)
    # It has no use for a zygote.
    assert processes_of(keeper) == {server["pid"], pid_of(server, kernel)}


# Changes on disk

SITECUSTOMIZE = """
import sys
if "ipykernel_launcher" in sys.orig_argv:
    import only_kernels
"""


class Site:
    """A keeper whose kernels, and only they, load a module of a directory of its own."""

    def __init__(self, keeper):
        self.keeper = keeper
        self.packages = keeper.base / "site"
        self.packages.mkdir()
        self.module = self.packages / "only_kernels.py"
        (self.packages / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.install(1)
        keeper.variables["PYTHONPATH"] = self.packages
        # Without bytecode, which has its own modification time and is not the subject here.
        keeper.variables["PYTHONDONTWRITEBYTECODE"] = "1"

    def install(self, version):
        """Change the module in place: its directory stays as it is."""
        self.module.write_text(f"version = {version}\n" + "#" * version)


@pytest.fixture
def site(tmp_path):
    found = Site(ForkingKeeper(tmp_path / "keeper"))
    try:
        found.keeper.start_to_fork()
        yield found
    finally:
        found.keeper.close()


VERSION = "import sys; sys.modules['only_kernels'].version"


def test_kernel_is_executed_when_its_modules_have_changed_and_later_servers_fork(site):
    keeper = site.keeper
    old = ready_to_fork(keeper, "old")
    loader = find_loader(old)
    kernel, _ = fork_kernel(old)
    assert run_cell(old, kernel, VERSION) == "1"

    # Only the loader has this module: it is replaced, and the fork server stays.
    site.install(2)
    executed = start_kernel(old)
    reason = f"{site.module} has changed on disk since ipykernel was loaded"
    assert launched(old, executed) == ("exec", reason)
    assert run_cell(old, executed, VERSION) == "2"
    assert run_cell(old, kernel, VERSION) == "1"
    until(lambda: not alive(loader.pid), what="the stale loader to end")

    def next_loader():
        forked(keeper, "needs-one")
        assert keeper.delete("needs-one").status_code == 200
        return find_loader(old)

    until(next_loader, what="the next loader")
    new = ready_to_fork(keeper, "new")
    assert parent_of(new) == parent_of(old)
    kernel, _ = fork_kernel(new)
    assert run_cell(new, kernel, VERSION) == "2"

    # The fork server has this directory on its path: it is replaced, with its loader.
    replaced = find_loader(new)
    (site.packages / "another.py").write_text("")
    executed = start_kernel(new)
    reason = f"{site.packages} has changed on disk since ipykernel was loaded"
    assert launched(new, executed) == ("exec", reason)
    newest = ready_to_fork(keeper, "newest")
    assert parent_of(newest) != parent_of(new)
    fork_kernel(newest)
    until(lambda: not alive(replaced.pid), what="the loader of the retired fork server to end")
    assert run_cell(new, kernel, VERSION) == "2"


# Load


def test_fifty_kernels_that_are_started_at_once_are_forked_and_leave_no_zombie(keeper):
    server = ready_to_fork(keeper)
    zygote = zygote_of(server)

    def use(number):
        kernel = start_kernel(server)
        assert run_cell(server, kernel, f"{number} * {number}") == str(number**2)
        return kernel

    with ThreadPoolExecutor(10) as users:
        kernels = list(users.map(use, range(50)))
        assert {launched(server, kernel) for kernel in kernels} == {("fork", None)}
        pids = {process.pid for process in zygote.children()}
        assert len(pids) == len(set(kernels)) == 50
        assert pids == set(users.map(lambda kernel: pid_of(server, kernel), kernels))
        list(users.map(lambda kernel: ask(server, "DELETE", f"kernels/{kernel}"), kernels))
    assert ask(server, "GET", "kernels") == []
    # Zombies would be among them.
    until(lambda: zygote.children() == [], what="all kernels to be reaped")
    assert processes_of(keeper) == {server["pid"], zygote.pid}
    fork_kernel(server)


# What the keeper reports


def test_usage_of_a_server_includes_its_forked_kernels(keeper):
    server = ready_to_fork(keeper)

    def of_server_and_zygote():
        usage = keeper.get()["usage"]
        return usage if usage and (usage["processes"], usage["kernels"]) == (2, 0) else None

    before = until(of_server_and_zygote, what="a usage sample of the server and its zygote")
    kernel, _ = fork_kernel(server)
    run_cell(
        server,
        kernel,
        "data = bytearray(b'x') * (200 << 20); import time; end = time.process_time() + 0.5\n"
        "while time.process_time() < end: pass",
    )

    def grown():
        usage = keeper.get()["usage"]
        more = usage["memory"] - before["memory"]
        return usage if more > 190 * MIB and usage["kernels"] == 1 else None

    after = until(grown, what="a usage sample with the memory of the kernel")
    assert after["processes"] == 3
    assert after["threads"] > before["threads"]
    until(
        lambda: keeper.get()["usage"]["cpu_seconds"] > before["cpu_seconds"] + 0.5,
        what="a usage sample with the CPU time of the kernel",
    )


def test_busy_forked_kernel_holds_its_server(keeper):
    server = ready_to_fork(keeper, idle_timeout="1h")
    kernel, _ = fork_kernel(server)
    with kernel_websocket(server, kernel) as socket_:
        send_cell(socket_, "import time; time.sleep(600)")
        until(
            lambda: ask(server, "GET", f"kernels/{kernel}")["execution_state"] == "busy",
            what="the kernel to be busy",
        )
    held = keeper.http.get("/api/servers/default/idle").json()
    assert (held["state"], held["held_by"]) == (
        "in-use",
        [{"kind": "kernel", "id": kernel, "reason": "is busy"}],
    )

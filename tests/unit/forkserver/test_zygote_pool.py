"""A server loads zygotes for the kernels that it had to execute."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

import psutil
import pytest
from jupyter_client.connect import write_connection_file

from harness import alive
from labkeeper.forkserver import zygote_client, zygote_pool
from labkeeper.forkserver.zygote_client import CannotFork, Zygote
from labkeeper.forkserver.zygote_pool import Interpreter, ZygotePool, interpreter_of
from launches import launch_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")

SECONDS = 30.0
NO_FIRST = "there is no first one"


class Server:
    """What a server has to fork kernels with: a pool, and a directory."""

    def __init__(self, directory):
        self.directory = directory
        launch = launch_in(directory)
        self.pool = ZygotePool(Zygote(None, launch, NO_FIRST), launch)
        self.kernels = []

    def command(self, python=sys.executable, *options):
        number = len(list(self.directory.glob("kernel-*.json")))
        file, _ = write_connection_file(str(self.directory / f"kernel-{number}.json"), key=b"key")
        return [python, *options, "-m", "ipykernel_launcher", "-f", file]

    async def fork(self, python=sys.executable, *options, **env):
        command = self.command(python, *options)
        kernel = await self.pool.fork(command, {**os.environ, **env}, "/", again=False)
        self.kernels.append(kernel)
        return kernel

    async def reason(self, python=sys.executable, *options, **env):
        with pytest.raises(CannotFork) as because:
            await self.fork(python, *options, **env)
        return str(because.value)

    async def fork_when_loaded(self, python=sys.executable, *options, **env):
        for _ in range(round(SECONDS / 0.1)):
            with contextlib.suppress(CannotFork):
                return await self.fork(python, *options, **env)
            await asyncio.sleep(0.1)
        raise AssertionError("no kernel can be forked")

    async def end(self):
        for kernel in self.kernels:
            kernel.kill()
            kernel.wait()
        await self.pool.end()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a test with a server, which must leave no process behind."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(zygote_pool, "_PAUSE", 0.0)
    # Not theirs in turn: a keeper of other tests may be one of them.
    before = set(psutil.Process().children())

    def run(test):
        async def whole():
            server = Server(tmp_path)
            try:
                await test(server)
            finally:
                await server.end()

        asyncio.run(whole())
        assert not set(psutil.Process().children()) - before

    return run


async def until(condition):
    for _ in range(round(SECONDS / 0.05)):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it has not become true")


def loaded(server):
    return [one.process.pid for one in server.pool._loaded]


def kernels_in(directory):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(part.startswith(f"{directory}/kernel-") for part in process.cmdline()):
                found.append(process)
    return found


def test_first_kernel_is_executed_and_later_ones_are_forked(run):
    async def test(server):
        assert await server.reason() == NO_FIRST
        kernel = await server.fork_when_loaded()
        assert psutil.Process(kernel.pid).ppid() in loaded(server)
        assert kernel.poll() is None
        os.kill(kernel.pid, signal.SIGTERM)
        assert kernel.wait() == -signal.SIGTERM

    run(test)


def test_each_interpreter_option_and_environment_has_a_zygote_of_its_own(run):
    async def test(server):
        await server.reason()
        await server.reason(sys.executable, "-O")
        plain, optimized = (
            await server.fork_when_loaded(),
            await server.fork_when_loaded(sys.executable, "-O"),
        )
        parents = {psutil.Process(kernel.pid).ppid() for kernel in (plain, optimized)}
        assert parents == set(loaded(server))
        assert len(parents) == 2
        # A third one would be one too many.
        assert "OMP_NUM_THREADS" in await server.reason(OMP_NUM_THREADS="3")
        await asyncio.sleep(0.1)
        assert set(loaded(server)) == parents

    run(test)


def test_zygote_for_another_environment_is_loaded_beside_the_first(run):
    async def test(server):
        await server.reason()
        await server.fork_when_loaded()
        assert await server.reason(OMP_NUM_THREADS="3") == (
            "the environment variable OMP_NUM_THREADS takes effect only when a program starts"
        )
        await server.fork_when_loaded(OMP_NUM_THREADS="3")
        assert len(loaded(server)) == 2

    run(test)


def test_zygote_that_is_not_needed_ends_but_not_while_a_kernel_runs(run, monkeypatch):
    async def test(server):
        monkeypatch.setattr(zygote_pool, "_LOOK_EVERY", 0.05)
        await server.reason()
        kernel = await server.fork_when_loaded()
        (zygote,) = loaded(server)
        monkeypatch.setattr(zygote_pool, "_IDLE_SECONDS", 0.0)
        await asyncio.sleep(0.3)
        assert loaded(server) == [zygote]
        kernel.kill()
        await until(lambda: not loaded(server))
        assert not alive(zygote)

    run(test)


def test_zygote_that_is_killed_is_replaced_and_its_kernels_run_on(run):
    async def test(server):
        await server.reason()
        kernel = await server.fork_when_loaded()
        (zygote,) = loaded(server)
        os.kill(zygote, signal.SIGKILL)
        await until(lambda: not loaded(server))
        assert kernel.poll() is None
        await server.fork_when_loaded()
        assert loaded(server) != [zygote]
        kernel.kill()
        assert kernel.wait() == 255, "nobody has seen how it ended"

    run(test)


def test_zygote_that_does_not_answer_starts_no_kernel_later(run, monkeypatch):
    async def test(server):
        await server.reason()
        await server.fork_when_loaded()
        (zygote,) = loaded(server)
        monkeypatch.setattr(zygote_client, "_ANSWER_SECONDS", 0.2)
        os.kill(zygote, signal.SIGSTOP)
        assert await server.reason() == "the zygote did not answer"
        for kernel in server.kernels:
            kernel.kill()
        os.kill(zygote, signal.SIGCONT)
        await until(lambda: zygote not in loaded(server))
        assert not kernels_in(server.directory)

    run(test)


def test_interpreter_without_ipykernel_is_not_tried_again_and_the_reason_is_told(run):
    async def test(server):
        python = sys._base_executable
        assert await server.reason(python) == f"ipykernel of {python} is not loaded yet"
        await until(lambda: server.pool._failed)
        assert "loading ipykernel failed: No module named" in await server.reason(python)
        await asyncio.sleep(0.1)
        assert not loaded(server)

    run(test)


def test_nothing_is_loaded_for_kernels_that_are_not_ipykernels_or_have_no_directory(run):
    async def test(server):
        environment = dict(os.environ)
        with pytest.raises(CannotFork, match="it is no IPython kernel"):
            await server.pool.fork(["R", "--slave"], environment, "/", again=False)
        nowhere = str(server.directory / "nowhere")
        with pytest.raises(CannotFork, match="nowhere cannot be entered"):
            await server.pool.fork(server.command(), environment, nowhere, again=False)
        await asyncio.sleep(0.1)
        assert not loaded(server)

    run(test)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/p", "-m", "ipykernel_launcher", "-f", "x"], Interpreter("/p")),
        (["/p", "-Xfrozen_modules=off", "-m", "ipykernel_launcher"], Interpreter("/p")),
        (["/p", "-O", "-Xdev", "-m", "ipykernel_launcher"], Interpreter("/p", ("-O", "-Xdev"))),
    ],
)
def test_kernels_differ_by_interpreter_and_options(command, expected):
    assert interpreter_of(command) == expected


@pytest.mark.parametrize(
    "command", [["/p"], ["/p", "-m"], ["/p", "-m", "bash_kernel"], ["/p", "ipykernel_launcher"]]
)
def test_command_that_executes_no_ipykernel_is_recognized(command):
    with pytest.raises(CannotFork, match="it is no IPython kernel"):
        interpreter_of(command)

"""Jupyter's kernel provisioner of a server: its kernels are forked where that is possible.

It is the default provisioner, so a kernelspec that names one keeps it. A kernel that cannot be
forked is executed as by Jupyter, and the reason is told. The end of either is noticed at once;
Jupyter looks every three seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import pathlib
from importlib.metadata import EntryPoint
from typing import Any

from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from .classes import derived
from .zygote_client import CannotFork
from .zygote_pool import ZygotePool

NAME = "labkeeper-provisioner"
_JUPYTERS = "local-provisioner"
"""The name of the provisioner that this one derives from."""
_USUAL = {"cwd", "env", "extra_arguments", "kernel_id"}
"""Arguments of a launch that are no options of `subprocess.Popen`, or that a fork can apply."""


class KernelProvisioner(LocalProvisioner):  # type: ignore[misc, unused-ignore]
    """Forks a kernel, or executes it."""

    parent: Any
    pid: Any
    process: Any
    zygotes: ZygotePool
    """Those of this process, which is one server."""
    launched_by: str | None = None
    exec_reason: str | None = None
    restarter: Any = None
    """Jupyter's restarter of this kernel, if it is to be restarted."""
    _polling: Any = None
    """Its present look, which must be referred to."""
    _end: int | None = None
    """A handle (pidfd) of the present process."""

    async def pre_launch(self, **given: Any) -> dict[str, Any]:
        """Prepare as Jupyter does; from then on this kernel's restarter is told of its end."""
        kind = getattr(self.parent, "restarter_class", None)
        if kind is not None and self.launched_by is None:
            self.parent.restarter_class = _prompt(kind)
        return dict(await super().pre_launch(**given))

    async def launch_kernel(self, cmd: list[str], **given: Any) -> Any:
        """Fork the kernel, or execute it, and watch for its end."""
        again = self.launched_by is not None
        try:
            if unusual := sorted(given.keys() - _USUAL):
                raise CannotFork(f"it is launched with {', '.join(unusual)}")
            await self._fork(cmd, given, again=again)
        except CannotFork as because:
            self.launched_by, self.exec_reason = "exec", str(because)
            self.log.info("Kernel %s is executed: %s", self.kernel_id, because)
            await super().launch_kernel(cmd, **given)
        self._watch()
        return self.connection_info

    async def wait(self) -> int | None:
        """Wait for the end."""
        self._forget()
        return await super().wait()  # type: ignore[no-any-return, unused-ignore]

    async def cleanup(self, restart: bool = False) -> None:  # noqa: FBT002 - Jupyter's
        """Return the ports, unless it is a restart."""
        self._forget()
        await super().cleanup(restart=restart)

    async def _fork(self, cmd: list[str], given: dict[str, Any], *, again: bool) -> None:
        env = {**given["env"], "JPY_PARENT_PID": str(os.getpid())}
        # Without one it is the server's own; a zygote has another.
        cwd = os.fspath(given.get("cwd") or os.getcwd())
        self.process = await self.zygotes.fork(cmd, env, cwd, again=again)
        self.pid = self.pgid = self.process.pid
        self.cwd = given.get("cwd", pathlib.Path.cwd())
        self.launched_by, self.exec_reason = "fork", None

    def _watch(self) -> None:
        self._forget()
        # Missing outside Linux; the process may have ended already, which its restarter finds.
        with contextlib.suppress(AttributeError, OSError):
            self._end = os.pidfd_open(self.pid)
            asyncio.get_running_loop().add_reader(self._end, self._ended)

    def _ended(self) -> None:
        self._forget()
        # It polls at the end of a shutdown, too, and then must not.
        if self.restarter is not None and not self.parent.shutting_down:
            polled = self.restarter.poll()
            if inspect.isawaitable(polled):
                self._polling = asyncio.ensure_future(polled)

    def _forget(self) -> None:
        if self._end is not None:
            asyncio.get_running_loop().remove_reader(self._end)
            os.close(self._end)
            self._end = None


def provide(app: Any, zygotes: ZygotePool) -> None:
    """Make this provisioner the default of an application, unless its site has chosen another."""
    KernelProvisioner.zygotes = zygotes
    factory: Any = KernelProvisionerFactory
    chosen = app.config.get(factory.__name__, {}).get("default_provisioner_name")
    chosen = chosen or os.environ.get(factory.default_provisioner_name_env, _JUPYTERS)
    if chosen == _JUPYTERS:
        app.config[factory.__name__].default_provisioner_name = NAME
        factory.provisioners[NAME] = EntryPoint(
            NAME, f"{__name__}:{KernelProvisioner.__name__}", factory.GROUP_NAME
        )


def _prompt(kind: Any) -> Any:
    """Derive a restarter that its kernel's provisioner can ask to look."""

    def start(restarter: Any) -> None:
        kind.start(restarter)
        restarter.kernel_manager.provisioner.restarter = restarter

    return derived(kind, {"start": start})

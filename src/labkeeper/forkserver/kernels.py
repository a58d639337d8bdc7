"""The kernels of a server, inside it: what they get, which there are, and how they end with it.

The server writes down which kernels and sessions it has whenever that changes, so that its keeper knows them also after it was
killed. A kernel on a gateway is written down before the gateway is asked for it: its id is chosen here (`KERNEL_ID`), which an
Enterprise Gateway takes up and a Kernel Gateway does not. When the server ends, its kernels on a gateway are ended side by side
and within a time, where Jupyter would wait for one after another, and for ever for a gateway that does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

RECORD = "kernels.json"
"""In Jupyter's runtime directory: the kernels that there are."""
STOP_REQUEST = "stop.json"
"""In the server's directory: how its keeper wants it to end."""
_PATIENCE = 30.0
"""Seconds for the kernels on a gateway to end, when no keeper says otherwise."""
_CHANGES = (("kernel_manager", ("start_kernel", "shutdown_kernel")),
            ("session_manager", ("save_session", "update_session", "delete_session")))  # fmt: skip
"""What changes the record, all of it documented for those who replace these managers."""
_COLUMNS = ("path", "name", "type", "kernel_id")


class Kernels:
    """The kernels of one initialised ServerApp."""

    def __init__(self, app: Any, server_dir: str, kernel_env: Mapping[str, str]) -> None:
        """Give them their environment, and keep the record of them from now on."""
        self._app = app
        self._manager = app.kernel_manager
        self._server_dir = server_dir
        self._env = kernel_env
        self._remote = bool(app.gateway_config.gateway_enabled)
        self._starting: dict[str, asyncio.Future[Any]] = {}
        """Those that the gateway was asked for, by the id that was chosen, as long as it has not answered."""
        if self._remote:
            # Of an adapter, the logger: that is what has filters.
            getattr(app.log, "logger", app.log).addFilter(_without_environment)
            self._make = self._manager.kernel_manager_factory
            self._manager.kernel_manager_factory = self._make_remote
        self._start = self._manager.start_kernel
        self._manager.start_kernel = self._start_kernel
        for manager, methods in _CHANGES:
            for method in methods:
                self._record_after(getattr(app, manager), method)
        self.record()

    def record(self) -> None:
        """Write down which kernels and sessions there are now."""
        sessions = []
        with contextlib.suppress(Exception):  # A session manager of another make need not have a table.
            rows = self._app.session_manager.connection.execute("SELECT * FROM session").fetchall()
            sessions = [{column: str(row[column]) for column in _COLUMNS} for row in rows]
        there = {"kernels": list(self._manager.list_kernel_ids()), "starting": list(self._starting), "sessions": sessions}
        path = os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], RECORD)
        half = f"{path}.{os.getpid()}"
        try:
            with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(there, file)
            os.replace(half, path)
        except OSError as error:
            self._app.log.warning("cannot write down which kernels there are: %s", error)

    async def end(self, by_default: Callable[[], Any]) -> None:
        """End them, or leave those on the gateway, as the keeper wishes; the server is ending itself."""
        if not self._remote:
            await by_default()
            return
        stop_request = _read_stop_request(self._server_dir)
        within = float(stop_request.get("within", _PATIENCE))
        # One that arrives later would be nobody's.
        await _wait(self._starting.values(), within / 2)
        ids = list(self._manager.list_kernel_ids())
        if stop_request.get("keep_kernels"):
            self._app.log.info("Leaving %d kernels on the gateway", len(ids))
            return
        self._app.log.info("Shutting down %d kernels on the gateway", len(ids))
        ends = {kernel_id: asyncio.ensure_future(self._manager.shutdown_kernel(kernel_id)) for kernel_id in ids}
        await _wait(ends.values(), within / 2)
        for kernel_id, ended in ends.items():
            if not ended.done():
                self._app.log.warning("Kernel %s may be left on the gateway: it did not answer in time", kernel_id)
            elif ended.exception() is not None:
                self._app.log.warning("Kernel %s may be left on the gateway: %s", kernel_id, ended.exception())
        self.record()

    async def _start_kernel(self, **given: Any) -> Any:
        env = {**os.environ, **(given.get("env") or {}), **self._env}
        if not self._remote or given.get("kernel_id") is not None:
            return await self._start(**{**given, "env": env})
        chosen = str(uuid.uuid4())
        start = asyncio.ensure_future(self._start(**{**given, "env": {**env, "KERNEL_ID": chosen}}))
        self._starting[chosen] = start
        self.record()
        try:
            return await start
        finally:
            del self._starting[chosen]

    def _make_remote(self, **given: Any) -> Any:
        """Make the manager of a kernel on the gateway, which keeps what it knows while the gateway cannot be asked.

        When Jupyter lists kernels, it drops each one that is missing from the list and cannot be queried. A kernel that was
        started while the list was in transit is missing, too; if the gateway fails then, the kernel would leak unrecorded.
        """
        kernel = self._make(**given)
        refresh = kernel.refresh_model

        async def refresh_model(model: Any = None) -> Any:
            try:
                return await refresh(model)
            except Exception:
                if kernel.kernel is None:
                    raise
                return kernel.kernel

        kernel.refresh_model = refresh_model
        return kernel

    def _record_after(self, manager: Any, method: str) -> None:
        """Write the record whenever a method of a manager has done its work, or failed."""
        do = getattr(manager, method)

        async def and_record(*given: Any, **named: Any) -> Any:
            try:
                return await do(*given, **named)
            finally:
                self.record()

        setattr(manager, method, and_record)


def _without_environment(record: logging.LogRecord) -> bool:
    """Shorten the line in which Jupyter's gateway manager logs all that a kernel was started with, its whole environment too."""
    if isinstance(record.msg, str) and "started kernel: " in record.msg:
        record.msg = record.msg.partition(", args: ")[0]
    return True


async def _wait(tasks: Iterable[asyncio.Future[Any]], seconds: float) -> None:
    waited_for = list(tasks)
    if waited_for:
        await asyncio.wait(waited_for, timeout=seconds)


def _read_stop_request(server_dir: str) -> dict[str, Any]:
    try:
        with open(os.path.join(server_dir, STOP_REQUEST)) as file:
            stop_request = json.load(file)
    except (OSError, ValueError):
        return {}
    return stop_request if isinstance(stop_request, dict) else {}

"""A server's kernels, from inside: their environment, their record, and their end.

The server records its kernels and sessions at each change, so that its keeper knows them even after
a kill. A kernel on a gateway is recorded before the gateway is asked for it: its id is chosen here
(`KERNEL_ID`), which an Enterprise Gateway uses and a Kernel Gateway ignores. When the server ends,
its kernels on a gateway are ended in parallel and with a timeout; Jupyter would end them one after
another, and wait forever for a gateway that does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .classes import derived

RECORD = "kernels.json"
"""File with the list of kernels, in Jupyter's runtime directory."""
RECORD_VERSION = 1
"""Version of that file; without one it is 1."""
STOP_REQUEST = "stop.json"
"""File in the server's directory: how its keeper wants it to end."""
STOP_REQUEST_VERSION = 1
"""Version of that file; without one it is 1."""
_PATIENCE = 30.0
"""Default seconds for the kernels on a gateway to end."""
_COLUMNS = ("path", "name", "type", "kernel_id")


class Kernels:
    """The kernels of one ServerApp: manager classes that keep the record, and their shutdown."""

    def __init__(self, app: Any, server_dir: str, kernel_env: Mapping[str, str]) -> None:
        """Take an application with a gateway configuration but without managers yet."""
        self._app = app
        self._server_dir = server_dir
        self._env = kernel_env
        self._remote = bool(app.gateway_config.gateway_enabled)
        self._starting: dict[str, asyncio.Future[Any]] = {}
        """Requests that the gateway has not answered yet, by the chosen id."""

    def recording_manager(self, kind: Any) -> Any:
        """Return a kernel manager class that also sets the environment, and the id on a gateway."""

        async def start_kernel(manager: Any, **given: Any) -> Any:
            return await self._start(functools.partial(kind.start_kernel, manager), given)

        def kernel_model(manager: Any, kernel_id: str) -> Any:
            kernel = manager.get_kernel(kernel_id)
            if kernel.has_trait("last_activity") and not kernel.trait_has_value("last_activity"):
                # It starts at this moment; Jupyter's list would fail altogether.
                raise KeyError(kernel_id)
            model = kind.kernel_model(manager, kernel_id)
            provisioner: Any = getattr(kernel, "provisioner", None)
            if (launched_by := getattr(provisioner, "launched_by", None)) is not None:
                model.update(launched_by=launched_by, exec_reason=provisioner.exec_reason)
            return model

        base = derived(kind, {"kernel_model": kernel_model})
        return self._recording(base, ("start_kernel", "shutdown_kernel"), start_kernel=start_kernel)

    def recording_sessions(self, kind: Any) -> Any:
        """Return a session manager class."""
        return self._recording(kind, ("save_session", "update_session", "delete_session"))

    def attend(self) -> None:
        """Finish the setup once the managers exist."""
        if self._remote:
            # The logger of an adapter: only loggers have filters.
            getattr(self._app.log, "logger", self._app.log).addFilter(_without_environment)
            manager = self._app.kernel_manager
            manager.kernel_manager_class = _lasting(manager.kernel_manager_class)

    def record(self) -> None:
        """Write the present kernels and sessions to the record."""
        sessions = []
        with contextlib.suppress(Exception):  # Other session managers may have no such table.
            rows = self._app.session_manager.connection.execute("SELECT * FROM session").fetchall()
            sessions = [{column: str(row[column]) for column in _COLUMNS} for row in rows]
        there = {
            "version": RECORD_VERSION,
            "kernels": list(self._app.kernel_manager.list_kernel_ids()),
            "starting": list(self._starting),
            "sessions": sessions,
        }
        path = os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], RECORD)
        half = f"{path}.{os.getpid()}"
        try:
            with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(there, file)
            os.replace(half, path)
        except OSError as error:
            self._app.log.warning("cannot record the kernels: %s", error)

    async def end(self, by_default: Callable[[], Any]) -> None:
        """End the kernels, or leave those on the gateway, as the keeper requested."""
        if not self._remote:
            await by_default()
            return
        stop_request = self._read_stop_request()
        within = float(stop_request.get("within", _PATIENCE))
        # A kernel that arrives later would have no owner.
        await _wait(self._starting.values(), within / 2)
        ids = list(self._app.kernel_manager.list_kernel_ids())
        if stop_request.get("keep_kernels"):
            self._app.log.info("Leaving %d kernels on the gateway", len(ids))
            return
        self._app.log.info("Shutting down %d kernels on the gateway", len(ids))
        ends = {
            kernel_id: asyncio.ensure_future(self._app.kernel_manager.shutdown_kernel(kernel_id))
            for kernel_id in ids
        }
        await _wait(ends.values(), within / 2)
        for kernel_id, ended in ends.items():
            why = ended.exception() if ended.done() else "it did not answer in time"
            if why is not None:
                self._app.log.warning("Kernel %s may be left on the gateway: %s", kernel_id, why)
        self.record()

    async def _start(self, start: Callable[..., Any], given: dict[str, Any]) -> Any:
        env = {**os.environ, **(given.get("env") or {}), **self._env}
        if not self._remote or given.get("kernel_id") is not None:
            return await start(**{**given, "env": env})
        chosen = str(uuid.uuid4())
        started = asyncio.ensure_future(start(**{**given, "env": {**env, "KERNEL_ID": chosen}}))
        self._starting[chosen] = started
        self.record()
        try:
            return await started
        finally:
            del self._starting[chosen]

    def _read_stop_request(self) -> dict[str, Any]:
        try:
            with open(os.path.join(self._server_dir, STOP_REQUEST)) as file:
                stop_request = json.load(file)
        except (OSError, ValueError):
            return {}
        if not isinstance(stop_request, dict):
            return {}
        if (version := stop_request.get("version", 1)) != STOP_REQUEST_VERSION:
            self._app.log.warning("cannot read %s of version %s", STOP_REQUEST, version)
            return {}
        return stop_request

    def _recording(self, kind: Any, names: Iterable[str], **ours: Callable[..., Any]) -> Any:
        """Derive a class whose methods of these (documented) names then write the record."""

        def recording(do: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(do)
            async def and_record(*given: Any, **named: Any) -> Any:
                try:
                    return await do(*given, **named)
                finally:
                    self.record()

            return and_record

        # A site's class may define its methods differently, and then keeps them.
        methods = {name: getattr(kind, name) for name in names if hasattr(kind, name)}
        return derived(kind, {name: recording(do) for name, do in {**methods, **ours}.items()})


def _lasting(name: str) -> str:
    """Derive a class of gateway kernels that keep their model while the gateway fails.

    Takes and returns a full class name. When Jupyter lists kernels, it drops each one that is
    missing from the list and cannot be queried. A kernel that was started while the list was in
    transit is missing, too; if the gateway fails then, the kernel would leak unrecorded.
    """
    from traitlets.utils.importstring import import_item

    kind: Any = import_item(name)

    async def refresh_model(kernel: Any, model: Any = None) -> Any:
        try:
            return await kind.refresh_model(kernel, model)
        except Exception:
            if kernel.kernel is None:
                raise
            return kernel.kernel

    # Jupyter takes a name and imports it.
    ours = f"_lasting_{kind.__name__}"
    globals()[ours] = derived(kind, {"refresh_model": refresh_model})
    return f"{__name__}.{ours}"


def _without_environment(record: logging.LogRecord) -> bool:
    """Cut a kernel's start arguments, such as its environment, from the gateway manager's log."""
    if isinstance(record.msg, str) and "started kernel: " in record.msg:
        record.msg = record.msg.partition(", args: ")[0]
    return True


async def _wait(tasks: Iterable[asyncio.Future[Any]], seconds: float) -> None:
    waited_for = list(tasks)
    if waited_for:
        await asyncio.wait(waited_for, timeout=seconds)

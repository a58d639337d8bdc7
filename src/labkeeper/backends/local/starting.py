"""Starts a server: prepares what its launch needs, has its process launched, and records it."""

from __future__ import annotations

import functools
import secrets
import socket
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from labkeeper import shortage
from labkeeper.backends.local.accounts import Account, check_passage, find_user, own_environment
from labkeeper.backends.local.launching import Launched, Launcher
from labkeeper.backends.local.limits import Enforced
from labkeeper.backends.local.processes import boot_id
from labkeeper.backends.local.server_dir import Asked, Record, ServerDir
from labkeeper.backends.local.sites import Sites
from labkeeper.backends.local.supervisor import ProcessSupervisor
from labkeeper.core.errors import BackendError, BackendRefused, BackendUnavailable
from labkeeper.core.messages import Report
from labkeeper.core.server import FailureClass, Progress, Stage
from labkeeper.core.spec import ServerSpec
from labkeeper.forkserver.identity import key_of
from labkeeper.forkserver.marks import MARK
from labkeeper.forkserver.wire import Launch
from labkeeper.jupyter.config import base_url, launch_config, launch_environment
from labkeeper.scrub import TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts the processes of servers."""

    sites: Sites
    launcher: Launcher

    def start(self, spec: ServerSpec, generation: int, hold: socket.socket) -> ProcessSupervisor:
        """Start the process of a server on the port that `hold` reserves.

        Raises BackendError, and OSError, ValueError and WireError, of which `start_error` makes
        one. The caller removes what has been created by then.
        """
        name, groups = spec.qualified_name, self.sites.groups
        server_dir, logfile = self.sites.server_dir(name), self.sites.log(name)
        headline = (
            f"[labkeeper] launch {generation} of server '{spec.name}', "
            f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        )
        Path(spec.root_dir).stat()
        user = find_user(spec)
        if user is not None:
            check_passage(spec, self.sites.options.runtime_dir)
        bundle = server_dir.prepare(spec, user.ids if user else None)
        limited = groups.limit(name, spec.limits, own_user=user is not None)
        port, token = hold.getsockname()[1], secrets.token_hex(TOKEN_BYTES)
        request = self._request(
            spec,
            server_dir,
            generation=generation,
            port=port,
            token=token,
            bundle=bundle,
            user=user,
            limited=limited,
        )
        if sys.platform != "linux":
            hold.close()
        with logfile.open(headline) as log:
            site = self.sites.site(name)
            launched = self.launcher.launch(
                request, log.fileno(), functools.partial(groups.hold, name)
            )
        record = self._record(spec, generation, launched, limited, port)
        supervisor = ProcessSupervisor.launched(site, record, launched, token=token, hold=hold)
        try:
            server_dir.write_record(record)
        except OSError:
            # It may not have its mark yet.
            supervisor.abort()
            raise
        if launched.reason is not None:
            message = f"JupyterLab is loaded by a new process: {launched.reason}"
            progress = Progress(Stage.STARTING, message)
            self.sites.report(Report(name, generation, progress))
        return supervisor

    def _request(
        self,
        spec: ServerSpec,
        server_dir: ServerDir,
        *,
        generation: int,
        port: int,
        token: str,
        bundle: Path | None,
        user: Account | None,
        limited: Enforced,
    ) -> Launch:
        secret = self.sites.options.identity_secret
        env = launch_environment(
            spec, own_environment(user), runtime_dir=server_dir.jupyter, ca_bundle=bundle
        )
        config = launch_config(
            spec,
            token=token,
            port=port,
            ca_bundle=bundle,
            base_path=self.sites.options.base_path,
            behind_edge=bool(secret),
            certificate=self.sites.options.certificate,
        )
        return Launch(
            server_dir=str(server_dir.path),
            title=f"jupyter-lab (server '{spec.name}' of labkeeper)",
            cwd=spec.root_dir,
            # The mark comes last: readers of /proc that stop at an empty entry have read the rest.
            env={**env, MARK: str(server_dir.path)},
            kernel_env=dict(spec.kernel_env),
            umask=self.sites.options.umask,
            config=config,
            user=user.ids if user else None,
            cgroups=list(limited.members),
            rlimits=dict(limited.rlimits),
            # Clients that attach to a kernel by its connection file do not know these keys, so only
            # kernels of other users get them.
            encrypt_kernels=user is not None,
            zygote_cgroups=self.sites.groups.create_beside(spec.qualified_name, limited.members),
            kernels_by="exec" if self.sites.options.kernels_by == "exec" else spec.kernels_by,
            preload=list(self.sites.options.preload),
            identity_key=key_of(secret, spec.qualified_name, generation) if secret else "",
        )

    def _record(
        self, spec: ServerSpec, generation: int, launched: Launched, limited: Enforced, port: int
    ) -> Record:
        return Record(
            generation=generation,
            pid=launched.process.pid,
            started=launched.process.started,
            boot=boot_id(),
            gateway=spec.gateway is not None,
            launched_by=launched.by,
            exec_reason=launched.reason,
            forkserver=launched.forkserver,
            limited_by=dict(limited.by),
            asked=Asked(
                hostname=spec.ip,
                port=port,
                base_url=base_url(spec, self.sites.options.base_path),
                secure=self.sites.options.certificate is not None,
                behind_edge=bool(self.sites.options.identity_secret),
            ),
        )


def start_error(spec: ServerSpec, error: Exception) -> BackendError:
    """Return the error of the backend for another one that prevented a start."""
    if shortage.is_ours(error):
        # Not the server's fault, and temporary.
        return BackendUnavailable(f"cannot start server '{spec.name}' now: {error}")
    kind = FailureClass.DISK_FULL if shortage.is_full(error) else FailureClass.CONFIG_ERROR
    return BackendRefused(f"cannot start server '{spec.name}': {error}", failure_class=kind)

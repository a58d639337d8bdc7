"""JupyterLab's server application with labkeeper's additions.

All of it uses Jupyter's public seams: `ExtensionApp.serverapp_class`, the traits that name manager
classes, and the extension manager. It imports Jupyter, so a process imports it once its log is
open.
"""

from __future__ import annotations

from typing import Any

import traitlets
from jupyter_server import serverapp
from jupyter_server.gateway.gateway_client import GatewayClient
from traitlets.config import Config

from . import extension, patches
from .identity import recognize
from .kernels import Kernels
from .provisioner import provide
from .websockets import prompt
from .wire import Launch
from .zygote_client import FirstZygote, Zygote
from .zygote_pool import ZygotePool


class ServerApp(serverapp.ServerApp):
    """Jupyter's server application, under its own name so that configuration for it applies."""

    launch = traitlets.Instance(Launch)
    ready = traitlets.Any(
        help="Called with this application when its socket listens and its loop runs."
    )
    zygote = traitlets.Instance(FirstZygote)
    zygotes: Any = traitlets.Instance(ZygotePool, allow_none=True)
    kernels = traitlets.Instance(Kernels, allow_none=True)

    def parse_command_line(self, argv: list[str] | None = None) -> None:  # noqa: ARG002 - Jupyter's
        """Skip the command line, which is empty: Jupyter would build a parser of all its traits."""
        self.argv, self.extra_args, self.cli_config = [], [], Config()

    def init_configurables(self) -> None:
        """Create managers with kernel records, of the classes that the site or Jupyter chose."""
        # Jupyter's own choice depends on this object, which is created only once.
        self.gateway_config = GatewayClient.instance(parent=self)
        off = "kernels run on the gateway" if self.gateway_config.gateway_enabled else ""
        if self.launch.kernels_by == "exec":
            off = "forking kernels is turned off (kernels_by=exec)"
        first = Zygote(self.zygote.connection, self.launch, self.zygote.why_not)
        self.zygotes = ZygotePool(first, self.launch, off)
        provide(self, self.zygotes)
        self.kernels = Kernels(self, self.launch.server_dir, self.launch.kernel_env)
        self.kernel_manager_class = self.kernels.recording_manager(self.kernel_manager_class)
        self.session_manager_class = self.kernels.recording_sessions(self.session_manager_class)
        self.kernel_websocket_connection_class = prompt(self.kernel_websocket_connection_class)
        super().init_configurables()
        if self.launch.identity_key:
            recognize(self.identity_provider, self.launch.identity_key)
        self.kernels.attend()

    def init_webapp(self) -> None:
        """Create the application with its routes."""
        if self.base_url != "/":
            patches.compile_routes_without(self.base_url)
        super().init_webapp()

    def load_server_extensions(self) -> None:
        """Load all extensions, labkeeper's last.

        Its page settings thus take effect, and no extension runs the loop after it.
        """
        # Only now it is known whether there is jupyter_lsp.
        patches.search_language_servers_when_asked()
        patches.ask_npm_once()
        super().load_server_extensions()
        manager: Any = self.extension_manager
        ours = extension.__name__
        manager.add_extension(ours, enabled=True)
        # The manager's own method would log errors, and keep a server running without protection or
        # records.
        manager.extensions[ours].load_all_points(self)
        self.io_loop.call_later(self.zygote.after, self.zygotes.prepare)

    async def cleanup_kernels(self) -> None:
        """End the kernels as the keeper requested, after extensions, which may still use them."""
        # None if it ends before it is initialised.
        if self.kernels is not None:
            await self.kernels.end(super().cleanup_kernels)
            await self.zygotes.end()

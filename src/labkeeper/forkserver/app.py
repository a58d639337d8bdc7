"""JupyterLab's server application with what is ours: managers that keep the record of kernels, and our extension.

All of it comes in where Jupyter provides for it: by `ExtensionApp.serverapp_class`, the traits that name the classes of managers,
and the extension manager. It imports Jupyter, so a process imports it when its log is open.
"""

from __future__ import annotations

from typing import Any

import traitlets
from jupyter_server import serverapp
from jupyter_server.gateway.gateway_client import GatewayClient
from traitlets.config import Config

from . import extension
from .kernels import Kernels
from .wire import Launch


class ServerApp(serverapp.ServerApp):
    """Jupyter's own, under its own name, so that configuration for it counts."""

    launch = traitlets.Instance(Launch)
    ready = traitlets.Any(help="Called with this application when its socket listens and its loop runs.")
    kernels = traitlets.Instance(Kernels, allow_none=True)

    def parse_command_line(self, argv: list[str] | None = None) -> None:
        """Parse the command line; where there is none, none."""
        if argv:
            super().parse_command_line(argv)
        else:
            self.argv, self.extra_args, self.cli_config = [], [], Config()

    def init_configurables(self) -> None:
        """Make the managers: of the classes that the site has chosen, or else Jupyter, and such that they keep the record."""
        # By this, which is made only once, Jupyter knows its own choice.
        self.gateway_config = GatewayClient.instance(parent=self)
        self.kernels = Kernels(self, self.launch.server_dir, self.launch.kernel_env)
        self.kernel_manager_class = self.kernels.recording_manager(self.kernel_manager_class)
        self.session_manager_class = self.kernels.recording_sessions(self.session_manager_class)
        super().init_configurables()
        self.kernels.attend()

    def load_server_extensions(self) -> None:
        """Load all extensions, and ours as the last one: what it says of pages counts, and none runs the loop after it."""
        super().load_server_extensions()
        manager: Any = self.extension_manager
        ours = extension.__name__
        manager.add_extension(ours, enabled=True)
        # The manager's own method would log what goes wrong, and let a server run on that nobody protects or records.
        manager.extensions[ours].load_all_points(self)

    async def cleanup_kernels(self) -> None:
        """End the kernels as the keeper wishes, when extensions have ended, which may still use them."""
        # There are none when it ends before it is initialised.
        if self.kernels is not None:
            await self.kernels.end(super().cleanup_kernels)

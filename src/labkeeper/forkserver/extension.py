"""Our extension of a Jupyter server: it protects pages, encrypts kernels, begins the record of them, and reports readiness.

It needs neither an entry point nor a line of configuration: `app.ServerApp` gives it to the extension manager. It is no
`ExtensionApp`, which would look for configuration files of its own, and parse a command line, at each start.
"""

from __future__ import annotations

import json
import os
from typing import Any

RECORD = "launch.json"
"""The file in a server's directory in which its keeper notes which process it is."""


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(app: Any) -> None:
    _protect_pages(app.web_app.settings)
    if app.launch.encrypt_kernels:
        _encrypt_kernels(app)
    app.kernels.record()
    # Jupyter binds and listens in the first round of the loop, and is queued after us; so this is for the second one. The hook
    # for what is to follow a start is not in every 2.x, and would let us wait for other extensions.
    app.io_loop.add_callback(app.io_loop.add_callback, app.ready, app)


def _protect_pages(settings: dict[str, Any]) -> None:
    """Keep the token out of the Lab's own page, and let no address of ours be told to other sites."""
    settings.setdefault("page_config_data", {})["token"] = ""
    # Where a site has chosen one it stays. Jupyter itself looks at who refers to its own files, so there has to be one.
    settings.setdefault("headers", {}).setdefault("Referrer-Policy", "same-origin")


def _encrypt_kernels(app: Any) -> None:
    """Let kernels that can do so encrypt what they say: every user of the machine can connect to their ports, and listen in.

    An older Jupyter cannot, and would warn of an option that it does not know; so it is none. Where a site has chosen it stays.
    """
    import zmq

    option, manager = "transport_encryption", app.kernel_manager
    sections = ("KernelManager", *(kind.__name__ for kind in type(manager).__mro__))
    chosen = any(option in app.config.get(section, ()) for section in sections)
    if manager.has_trait(option) and zmq.has("curve") and not chosen:
        setattr(manager, option, "auto")


def report_ready(app: Any, report: int, server_dir: str) -> None:
    """Tell the keeper, by the pipe that came with the launch, that the server listens, and where."""
    try:
        os.write(report, json.dumps({"ready": app.server_info()}).encode() + b"\n")
    except OSError:
        # Nobody listens. If a keeper has died, the next one finds us by its record. Where there is none of us, our launch was
        # given up before its keeper knew of us, and may have been done in another way.
        if not _is_recorded(server_dir):
            app.stop()
    os.close(report)


def _is_recorded(server_dir: str) -> bool:
    try:
        with open(os.path.join(server_dir, RECORD)) as record:
            return bool(json.load(record)["pid"] == os.getpid())
    except (OSError, ValueError, KeyError, TypeError):
        return False

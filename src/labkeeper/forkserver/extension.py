"""Jupyter server extension: page protection, kernel encryption and records, readiness report.

It needs no entry point and no configuration: `app.ServerApp` adds it to the extension manager. It
is no `ExtensionApp`, which would search for configuration files and parse a command line at each
start.
"""

from __future__ import annotations

import json
import os
from typing import Any

from . import wire

RECORD = "launch.json"
"""The file in a server's directory that records its process; written by the keeper."""


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(app: Any) -> None:
    _protect_pages(app.web_app.settings)
    _keep_bundles(app.web_app.settings)
    _spare_build_check(app)
    if app.launch.encrypt_kernels:
        _encrypt_kernels(app)
    app.kernels.record()
    # Jupyter binds and listens in the first iteration of the loop, queued after this extension; so
    # readiness is reported in the second. The hook for code after a start is missing in some 2.x
    # releases, and would wait for other extensions.
    app.io_loop.add_callback(app.io_loop.add_callback, app.ready, app)


def _protect_pages(settings: dict[str, Any]) -> None:
    """Keep the token out of the Lab page, and this server's addresses from other sites."""
    settings.setdefault("page_config_data", {})["token"] = ""
    # A site's choice stays. Jupyter checks the referrer for its own files, so there must be one.
    settings.setdefault("headers", {}).setdefault("Referrer-Policy", "same-origin")


def _keep_bundles(settings: dict[str, Any]) -> None:
    """Make browsers cache the bundles of extensions also if the server has a base_url.

    jupyterlab_server (2.28, `app.py`) leaves it out of their addresses, so browsers would request
    each of them again at each load.
    """
    base, known = settings["base_url"], settings.get("static_immutable_cache", [])
    left_out = [base + url.lstrip("/") for url in known if not url.startswith(base)]
    settings["static_immutable_cache"] = [*known, *left_out]


def _spare_build_check(app: Any) -> None:
    """Keep JupyterLab's page from asking whether JupyterLab must be built, if it cannot be so.

    The answer takes a second at each load of the page, and executes Node. Only extensions that were
    installed from source need a build.
    """
    for lab in app.extension_manager.extension_apps.get("jupyterlab", ()):
        if not may_need_build(lab.app_dir):
            app.web_app.settings["page_config_data"]["buildCheck"] = False


def may_need_build(app_dir: str) -> bool:
    """Whether JupyterLab was ever built there, or has extensions that are not (`commands.py`).

    In another directory than that of its package, it was.
    """
    from jupyterlab.commands import get_app_dir

    if os.environ.get("JUPYTERLAB_DIR") or os.path.realpath(app_dir) != os.path.realpath(
        get_app_dir()
    ):
        return True
    left = [os.path.join(app_dir, name) for name in ("extensions", "staging")]
    config = os.path.join(app_dir, "settings", "build_config.json")
    return os.path.exists(config) or any(os.path.isdir(path) and os.listdir(path) for path in left)


def _encrypt_kernels(app: Any) -> None:
    """Make capable kernels encrypt their traffic: all users of the machine can reach their ports.

    Older Jupyter releases lack the option and would warn about it, so it is not set there. A site's
    choice stays.
    """
    import zmq

    option, manager = "transport_encryption", app.kernel_manager
    sections = ("KernelManager", *(kind.__name__ for kind in type(manager).__mro__))
    chosen = any(option in app.config.get(section, ()) for section in sections)
    if manager.has_trait(option) and zmq.has("curve") and not chosen:
        setattr(manager, option, "auto")


def report_ready(app: Any, report: int) -> None:
    """Report on the launch's pipe that the server listens, and where."""
    try:
        os.write(report, wire.line({"ready": app.server_info()}))
    except OSError:
        # The pipe has no reader. If a keeper has died, the next one finds this server by its
        # record. Without a record, the launch was abandoned before the keeper knew of this process,
        # and may have been repeated in another way.
        if not _is_recorded(app.launch.server_dir):
            app.stop()
    os.close(report)


def _is_recorded(server_dir: str) -> bool:
    try:
        with open(os.path.join(server_dir, RECORD)) as record:
            return bool(json.load(record)["pid"] == os.getpid())
    except (OSError, ValueError, KeyError, TypeError):
        return False

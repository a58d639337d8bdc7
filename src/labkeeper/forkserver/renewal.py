"""What modules made at their import of the environment, the user and the directory of that time, and secrets: made anew.

A fork has all of this from its fork server, and so have its siblings. What is imported later sees what is the server's own.
A test looks through all modules of a forked server for what is still the fork server's.
"""

from __future__ import annotations

import importlib
import os
import secrets
import ssl
import sys
import sysconfig
from collections.abc import Callable
from types import ModuleType
from typing import Any


def renew() -> None:
    """Part from the fork server and from our siblings; environment, user and directory are our own already.

    In a fork `random` and OpenSSL do that by themselves.
    """
    for name, renew_module in _RENEWED.items():
        module = sys.modules.get(name)
        if module is not None:
            renew_module(module)


def _renew_site(site: Any) -> None:
    """Find packages where our own user has them; what was imported from elsewhere stays."""
    earlier = site.USER_SITE
    site.USER_BASE = site.USER_SITE = None
    if site.getusersitepackages() != earlier:
        sysconfig.get_config_vars()["userbase"] = site.getuserbase()
        if site.ENABLE_USER_SITE:
            sys.path[:] = [place for place in sys.path if place != earlier]
            site.addusersitepackages(set(sys.path))


def _renew_processes(process: Any) -> None:
    process.ORIGINAL_DIR = os.getcwd()
    # By this one a server knows the processes of its pools, and whoever else connects to them.
    process.current_process().authkey = secrets.token_bytes()


def _renew_random(random: Any) -> None:
    random.seed()


def _renew_trust(netutil: Any) -> None:
    context = getattr(netutil, "_client_ssl_defaults", None)
    if isinstance(context, ssl.SSLContext):  # Of a tornado before 6.6.
        context.set_default_verify_paths()


def _renew_sessions(session: Any) -> None:
    _set_defaults(session.Session, username=os.environ.get("USER", "username"))


def _renew_gateway(gateway_client: Any) -> None:
    gateway_client.GatewayClient.KERNEL_LAUNCH_TIMEOUT = int(os.environ.get("KERNEL_LAUNCH_TIMEOUT", "40"))


def _renew_lab(labapp: Any) -> None:
    from jupyterlab import commands

    settings, workspaces = commands.get_user_settings_dir(), commands.get_workspaces_dir()
    _set_defaults(labapp.LabApp, user_settings_dir=settings, workspaces_dir=workspaces)


def _set_defaults(kind: Any, **defaults: Any) -> None:
    """Set defaults of traits, which their class keeps beside them, too."""
    changed = {name: value for name, value in defaults.items() if getattr(kind, name).default_value != value}
    for name, value in changed.items():
        getattr(kind, name).default_value = value
    if changed:
        kind.setup_class(dict(vars(kind)))


_RENEWED: dict[str, Callable[[ModuleType], Any]] = {
    "site": _renew_site,
    "multiprocessing.process": _renew_processes,
    "numpy.random": _renew_random,
    # Who uses this one has its function, which looks into the module, and so finds the new values.
    "send2trash.plat_other": importlib.reload,
    "tornado.netutil": _renew_trust,
    "jupyter_client.session": _renew_sessions,
    "jupyter_server.gateway.gateway_client": _renew_gateway,
    "jupyterlab.labapp": _renew_lab,
}
"""By the name of each module that has something to be made once more."""

"""Renewal of state that modules computed at import: environment, user, directories and secrets.

A fork shares it with its fork server and its siblings. Modules imported later see the server's own.
A test scans all modules of a forked server for remaining state of the fork server.
"""

from __future__ import annotations

import functools
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
    """Renew all such modules; environment, user and directory must already be the server's own.

    `random` and OpenSSL reseed themselves in a fork.
    """
    for name, renew_module in _RENEWED.items():
        module = sys.modules.get(name)
        if module is not None:
            renew_module(module)


def _renew_site(site: Any) -> None:
    """Use the server user's site packages; modules imported from elsewhere stay."""
    earlier = site.USER_SITE
    site.USER_BASE = site.USER_SITE = None
    if site.getusersitepackages() != earlier:
        sysconfig.get_config_vars()["userbase"] = site.getuserbase()
        if site.ENABLE_USER_SITE:
            sys.path[:] = [place for place in sys.path if place != earlier]
            site.addusersitepackages(set(sys.path))


def _renew_processes(process: Any) -> None:
    process.ORIGINAL_DIR = os.getcwd()
    # Authenticates the server's process pools and clients that connect to them.
    process.current_process().authkey = secrets.token_bytes()


def _renew_threads(threading: Any) -> None:
    # Python before 3.13 keeps the number that it had in the parent.
    threading.main_thread()._set_native_id()  # noqa: SLF001 - as `threading` does itself


def _renew_random(random: Any) -> None:
    random.seed()


def _renew_torch(random: Any) -> None:
    random.default_generator.seed()


def _renew_trust(netutil: Any) -> None:
    context = getattr(netutil, "_client_ssl_defaults", None)
    if isinstance(context, ssl.SSLContext):  # tornado before 6.6.
        context.set_default_verify_paths()


def _renew_sessions(session: Any) -> None:
    _set_defaults(session.Session, username=os.environ.get("USER", "username"))


def _renew_gateway(gateway_client: Any) -> None:
    gateway_client.GatewayClient.KERNEL_LAUNCH_TIMEOUT = int(
        os.environ.get("KERNEL_LAUNCH_TIMEOUT", "40")
    )


def _renew_lab(labapp: Any) -> None:
    from jupyterlab import commands

    settings, workspaces = commands.get_user_settings_dir(), commands.get_workspaces_dir()
    _set_defaults(labapp.LabApp, user_settings_dir=settings, workspaces_dir=workspaces)


def _renew_plots(matplotlib: Any) -> None:
    """Use the kernel user's directories; they are made when they are asked for.

    Settings and fonts of users need no renewal: with any, a kernel is executed (see `libraries`).
    """
    for name in ("get_configdir", "get_cachedir"):
        find = getattr(matplotlib, name).__wrapped__
        setattr(matplotlib, name, functools.wraps(find)(functools.cache(find)))
    fonts: Any = sys.modules.get("matplotlib.font_manager")
    if fonts is None:
        return
    earlier, home = f"{fonts._HOME}/", os.path.expanduser("~/")  # noqa: SLF001 - not told elsewhere

    def moved(path: str) -> str:
        return home + path[len(earlier) :] if path.startswith(earlier) else path

    fonts._HOME = type(fonts._HOME)(home)  # noqa: SLF001
    for module, name in _PLACES:
        for places in filter(None, [getattr(sys.modules.get(module), name, None)]):
            places[:] = map(moved, places)
    tex: Any = getattr(sys.modules.get("matplotlib.texmanager"), "TexManager", None)
    if tex is not None:
        tex._cache_dir = type(tex._cache_dir)(moved(str(tex._cache_dir)))  # noqa: SLF001


_PLACES = (
    ("matplotlib.font_manager", "X11FontDirectories"),
    ("matplotlib.style", "USER_LIBRARY_PATHS"),
    ("matplotlib.style.core", "USER_LIBRARY_PATHS"),
)
"""Lists of directories of matplotlib; its versions have styles in one module or the other."""


def _set_defaults(kind: Any, **defaults: Any) -> None:
    """Set defaults of traits, including the copies in their class."""
    changed = {
        name: value
        for name, value in defaults.items()
        if getattr(kind, name).default_value != value
    }
    for name, value in changed.items():
        getattr(kind, name).default_value = value
    if changed:
        kind.setup_class(dict(vars(kind)))


_RENEWED: dict[str, Callable[[ModuleType], Any]] = {
    "site": _renew_site,
    "multiprocessing.process": _renew_processes,
    "threading": _renew_threads,
    "numpy.random": _renew_random,
    "torch.random": _renew_torch,
    "matplotlib": _renew_plots,
    # Its users hold its function, which reads the module's new values.
    "send2trash.plat_other": importlib.reload,
    "tornado.netutil": _renew_trust,
    "jupyter_client.session": _renew_sessions,
    "jupyter_server.gateway.gateway_client": _renew_gateway,
    "jupyterlab.labapp": _renew_lab,
}
"""By name of the module."""

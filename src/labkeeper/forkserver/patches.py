"""All patches of Jupyter's own classes, for which there is no public seam; each with its reason.

For each, `tests/unit/forkserver/test_patches.py` has a test that fails once it is obsolete.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
import sys
from collections.abc import Callable, Collection
from typing import Any

from . import npm

_READING = {"GET", "HEAD", "OPTIONS"}


def _saves_time(patch: Callable[[], None]) -> Callable[[], None]:
    """Do without a patch where Jupyter no longer has what it changes; only time is lost."""

    @functools.wraps(patch)
    def apply() -> None:
        with contextlib.suppress(ImportError, AttributeError):
            patch()

    return apply


def count_no_reading() -> None:
    """Keep read-only requests from counting as activity: an open tab polls the same lists all day.

    Jupyter has a switch for all requests of a handler (`_track_activity`) and for one request
    (`no_track_activity`), but none by which a site or an extension can select a method. Adding the
    argument here would show it to handlers that forward their request. An identity provider sees
    each request as well, but with a custom class Jupyter would drop what it does only for its own
    classes, and ignore login handlers of a site.
    """
    from jupyter_server.base.handlers import APIHandler

    count = APIHandler.update_api_activity

    def count_changes(self: Any) -> None:
        if self.request.method not in _READING:
            count(self)

    APIHandler.update_api_activity = count_changes  # type: ignore[method-assign]


def tell_no_page_the_token() -> None:
    """Keep the token out of HTML, where all code in a page could read it: browsers use a cookie.

    The page template writes it out for authenticated users. It comes from the identity provider,
    which must have it: servers are discovered and queried with its answers. Variables that a site
    passes to templates must not have a name of Jupyter's own.
    """
    from jupyter_server.base.handlers import JupyterHandler

    namespace: Any = JupyterHandler.template_namespace
    without = property(lambda self: {**namespace.fget(self), "token": ""})
    JupyterHandler.template_namespace = without  # type: ignore[method-assign, assignment]


def hold_ports() -> None:
    """Reserve the ports that Jupyter chooses for kernels.

    A kernel listens about a second after they were chosen. If another program has received one
    meanwhile, the kernel ends; jupyter_client (8.10) restarts it with the same ports until it gives
    up: https://github.com/jupyter/jupyter_client/issues/276. A kernel provisioner could choose
    other ports, but each kernelspec may name its own.

    On Linux a bound socket that does not listen allows programs with SO_REUSEADDR, such as ZeroMQ,
    to bind and listen; elsewhere it would be in the way.
    """
    from jupyter_client.connect import LocalPortCache

    if sys.platform != "linux":
        return

    class HeldPorts(LocalPortCache):  # type: ignore[misc, unused-ignore]
        """Jupyter's cache, with a reserving socket for each port in use."""

        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.holds: dict[int, socket.socket] = {}

        def find_available_port(self, ip: str) -> int:
            hold = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
            try:
                hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                hold.bind((ip, 0))
            except OSError:
                hold.close()
                raise
            port = int(hold.getsockname()[1])
            self.currently_used_ports.add(port)
            self.holds[port] = hold
            return port

        def return_port(self, port: int) -> None:
            super().return_port(port)
            if port in self.holds:
                self.holds.pop(port).close()

    LocalPortCache.clear_instance()
    HeldPorts.instance()


@_saves_time
def describe_the_system_once() -> None:
    """Keep Jupyter's description of the system, for which each start executes `uname` and `git`.

    It describes the installation (version, commit, platform), so it is the same in all servers. The
    commit is that of any repository around it, such as a clone with the virtual environment inside.
    Jupyter keeps it for pages, but not for its settings.
    """
    from jupyter_server import serverapp
    from jupyter_server.base import handlers

    application: Any = serverapp
    pages: Any = handlers
    pages.json_sys_info()
    application.get_sys_info = functools.partial(dict, application.get_sys_info())


@_saves_time
def parse_no_command_lines() -> None:
    """Spare extensions the parser of an empty command line: it would have all their options.

    An extension application has no other method that reads its command line.
    """
    from jupyter_server.extension.application import ExtensionApp
    from traitlets.config import Config

    def parse(app: Any, _: Any = None) -> None:
        app.argv, app.extra_args, app.cli_config = [], [], Config()

    application: Any = ExtensionApp
    application.parse_command_line = parse


@_saves_time
def search_language_servers_when_asked() -> None:
    """Let jupyter_lsp look for language servers when a browser first asks, not at each start.

    It executes npm, and R and Julia if there are any, and reads the metadata of all installed
    packages five times: more work than all else in a start. Its extension has no option for when
    it looks. It uses what it finds only in answers that first wait for `ready`.
    """
    if "jupyter_lsp" not in sys.modules:
        return
    from jupyter_lsp import serverextension
    from jupyter_lsp.manager import LanguageServerManager

    search, searched = serverextension.initialize, LanguageServerManager.ready
    arguments: list[Any] = []

    def defer(*given: Any) -> None:
        arguments.extend(given)

    @functools.cache
    def begin() -> Any:
        return asyncio.ensure_future(search(*arguments))

    async def ready(manager: Any) -> Any:
        if arguments:
            await begin()
        return await searched(manager)

    serverextension.initialize = defer
    LanguageServerManager.ready = ready


@_saves_time
def ask_npm_once() -> None:
    """Let jupyter_lsp ask npm for its global directory unless a rehearsal has asked it (see `npm`).

    The directories that it searches are a trait (`node_roots`), but one of them is the server's
    own, and the rules for the others are jupyter_lsp's.
    """
    if "jupyter_lsp" not in sys.modules:
        return
    from jupyter_lsp.types import LanguageServerManagerAPI

    ask = LanguageServerManagerAPI._npm_prefix  # noqa: SLF001 - there is no public name

    def prefix(*given: Any) -> str | None:
        return npm.global_prefix(functools.partial(ask, *given))

    LanguageServerManagerAPI._npm_prefix = prefix  # noqa: SLF001


def compile_routes_without(base_url: str) -> None:
    """Compile the patterns of routes without a base_url, as a rehearsal has: `re` knows them then.

    With one, a server would compile the pattern of each of its routes. Tornado compiles what it is
    given, and Jupyter joins base_url and route in several places.
    """
    from tornado.routing import PathMatches

    begin = PathMatches.__init__

    def init(self: Any, pattern: Any) -> None:
        if isinstance(pattern, str) and _is_below(pattern, base_url):
            rest = pattern[len(base_url) - 1 :]
            pattern = _Below(base_url, re.compile(rest if rest.endswith("$") else f"{rest}$"))
        begin(self, pattern)

    PathMatches.__init__ = init  # type: ignore[method-assign, assignment]


def _is_below(pattern: str, base_url: str) -> bool:
    """Whether a pattern matches paths below a base_url only."""
    outside_groups = pattern.partition("(")[0] + pattern.rpartition(")")[2]
    return pattern.startswith(base_url) and "|" not in outside_groups


class _Below:
    """A pattern for paths below a prefix, as far as tornado needs it to be one."""

    def __init__(self, prefix: str, rest: re.Pattern[str]) -> None:
        """Prefix and rest share a slash."""
        self._prefix = prefix
        self._rest = rest
        self.pattern = prefix + rest.pattern[1:]
        self.groups, self.groupindex = rest.groups, rest.groupindex

    def match(self, path: str) -> re.Match[str] | None:
        """Match a path from its begin on."""
        if not path.startswith(self._prefix):
            return None
        return self._rest.match(path[len(self._prefix) - 1 :])


def debug_libraries(kernel: Any, files: Collection[str]) -> None:
    """Let the debugger show code of libraries that were loaded before their kernel.

    ipykernel hides the code of all modules that it finds loaded, since without them they are its
    own; it passes their files to the debugger, in a list that both hold.
    """
    hidden: list[str] = getattr(kernel, "_kernel_modules", [])
    hidden[:] = [file for file in hidden if file not in files]

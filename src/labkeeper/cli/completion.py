"""Shell completion: the command `completion`, and names that only the keeper knows.

Whoever presses Tab waits for this: it loads neither models nor settings if it can do without, asks
for a short time only, and prints no errors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode, urlsplit

import click
from click.shell_completion import CompletionItem, get_completion_class

from labkeeper.cli.connect import Location, locate, locate_quickly
from labkeeper.cli.options import Where, examples
from labkeeper.cli.output import put
from labkeeper.core.errors import LabkeeperError
from labkeeper.core.lifecycle import AT_REST, State
from labkeeper.core.spec import DEFAULT_NAME, NAME_PATTERN
from labkeeper.settings.location import ca_file

if TYPE_CHECKING:
    import http.client

    from labkeeper.bounded_http import Answer

_WITHIN: Final = 0.3
"""Seconds for the keeper's answers; what has arrived by then is offered."""
_PAGE: Final = 200
"""Servers in one answer, which may have 4 MiB."""

_Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]
_Function = Callable[..., Any]


@click.command(
    epilog=examples(
        """eval "$(labkeeper completion bash)"  # in ~/.bashrc""",
        """eval "$(labkeeper completion zsh)"  # in ~/.zshrc, after compinit""",
        "labkeeper completion fish | source  # in ~/.config/fish/config.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, /, shell: str) -> None:
    """Print a script for shell completion, with names of servers.

    Add the line of the example to the file that it names, and open a new shell.

    Names of servers, tokens and sessions are those that the keeper has when you press Tab. If it
    does not answer within 0.3 seconds, there are none.
    """
    made = get_completion_class(shell)
    if made is None:
        raise LookupError(shell)
    # click itself acts on this variable, before it parses the command line.
    put(made(context.find_root().command, {}, "labkeeper", "_LABKEEPER_COMPLETE").source())


def name_argument(*states: State) -> Callable[[_Function], _Function]:
    """Return the argument NAME, completed with servers in one of the states, or with all."""
    return click.argument("name", default=DEFAULT_NAME, shell_complete=server_names(*states))


def server_names(*states: State) -> _Completer:
    """Return a completer of the names of servers in one of the states, or of all."""
    query = urlencode({"limit": _PAGE, "state": [str(state) for state in states]}, doseq=True)
    return _completer(f"/api/servers?{query}", "servers", "name", "state")


def to_stop(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Complete names of servers that `stop` would change."""
    states = () if context.params.get("delete") else tuple(s for s in State if s not in AT_REST)
    return server_names(*states)(context, parameter, incomplete)


def _completer(path: str, of: str, key: str, about: str) -> _Completer:
    """Return a completer of the texts at `key` in a list of the API, shown with those at `about`.

    Names that were already given are left out.
    """

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        given = context.params.get(str(parameter.name))
        taken = given if isinstance(given, tuple) else ()
        return [
            CompletionItem(one[key], help=_word(one.get(about)))
            for one in _listed(context.ensure_object(Where), path, of)
            if _word(one.get(key)) and one[key].startswith(incomplete) and one[key] not in taken
        ]

    return complete


token_names: Final = _completer("/api/tokens", "tokens", "name", "scope")
session_ids: Final = _completer("/api/sessions", "sessions", "id", "server")


def _word(text: object) -> str | None:
    """Return a text that no shell or terminal mistakes for something else, else None."""
    # Every name, state, scope and id is such a word; only what is no keeper sends others.
    return text if isinstance(text, str) and re.fullmatch(NAME_PATTERN, text) else None


def _listed(where: Where, path: str, of: str) -> Sequence[Mapping[str, Any]]:
    """Return what the keeper lists within the time; nothing if it cannot be asked."""
    from labkeeper.bounded_http import exchange  # noqa: PLC0415 - late: 17 ms

    found: list[Mapping[str, Any]] = []
    try:
        keeper = locate_quickly(where) or locate(where)
    except LabkeeperError:
        return found

    def ask() -> None:
        # Whatever answers there may send anything.
        with contextlib.suppress(Exception), contextlib.closing(_connection(keeper)) as connection:
            if keeper.socket is not None:
                _connect(connection, keeper.socket)
            for page in _pages(functools.partial(exchange, connection, "GET"), keeper, path):
                found.extend(one for one in page[of] if isinstance(one, dict))

    # A thread, because looking up the name of a host has no time limit.
    asking = threading.Thread(target=ask, name="completion", daemon=True)
    asking.start()
    asking.join(_WITHIN)
    return tuple(found)


def _pages(get: Callable[..., Answer], keeper: Location, path: str) -> Iterator[Any]:
    """Yield the pages of a list. Raises OSError, HTTPException, ValueError."""
    token, until = keeper.token, time.monotonic() + _WITHIN
    first = target = urlsplit(keeper.url).path + path
    while True:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = get(target, headers=headers, within=until - time.monotonic())
        if answer.status == HTTPStatus.UNAUTHORIZED and token is None and keeper.token_if_asked:
            token = keeper.token_if_asked
            continue
        page = json.loads(answer.body)
        yield page
        if not page.get("next"):
            return
        target = f"{first}&cursor={quote(page['next'])}"


def _connection(keeper: Location) -> http.client.HTTPConnection:
    """Return a connection, not yet connected. Raises OSError, HTTPException, ValueError."""
    import http.client  # noqa: PLC0415 - late: 17 ms
    import ssl  # noqa: PLC0415 - late: as http.client

    parts = urlsplit(keeper.url)
    if keeper.socket is not None or parts.scheme == "http":
        return http.client.HTTPConnection(parts.netloc, timeout=_WITHIN)
    context = ssl.create_default_context()
    if (trusted := ca_file()) is not None:
        context.load_verify_locations(trusted)
    return http.client.HTTPSConnection(parts.netloc, timeout=_WITHIN, context=context)


def _connect(connection: http.client.HTTPConnection, path: str) -> None:
    """Connect it to a Unix socket, and to nothing else. Raises OSError."""
    connection.auto_open = False
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(_WITHIN)
    connection.sock.connect(path)

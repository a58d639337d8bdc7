"""Access commands: `token`, `session`, and what they have below them; `whoami`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from labkeeper.cli.completion import session_ids, token_names
from labkeeper.cli.connect import connected, read_settings, token_of
from labkeeper.cli.options import Where, as_json_option, examples, pairs_of, where_options
from labkeeper.cli.output import ago, hint, print_json, print_table, put, waiting
from labkeeper.core.access import Scope
from labkeeper.core.errors import SettingsError

if TYPE_CHECKING:
    from labkeeper.client import Caller, Token


@click.group(
    invoke_without_command=True,
    epilog=examples(
        'curl -H "Authorization: Bearer $(labkeeper token)" http://127.0.0.1:8000/api/servers',
        "labkeeper token create ci --scope manage --server 'ci-*' --expires 30d",
        "labkeeper token ls",
        "labkeeper token revoke ci",
    ),
)
@where_options
@click.pass_context
def token(context: click.Context, /) -> None:
    """Print the owner's token; create, list and revoke others.

    The owner's token of the keeper on this machine may do everything. Others have a scope, and can
    be limited to some servers.
    """
    if context.invoked_subcommand is not None:
        return
    settings = read_settings(context.ensure_object(Where))
    found = token_of(settings)
    if found is None:
        raise SettingsError(
            f"cannot find a token in {settings.state_dir}; "
            "`labkeeper serve` creates one at its first start there"
        )
    put(found)


@token.command(
    epilog=examples(
        "labkeeper token create monitoring --scope read",
        "labkeeper token create ada --scope manage --server 'ada-*' --user ada",
        "labkeeper token create blue --scope manage --label team=blue --expires 90d",
    )
)
@click.argument("name")
@click.option(
    "--scope",
    type=click.Choice([str(scope) for scope in Scope]),
    required=True,
    help="What the token allows.",
)
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="PATTERN",
    help="Limit it to servers with matching names; repeatable.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="Limit it to servers with this label; repeatable.",
)
@click.option(
    "--user",
    "users",
    multiple=True,
    metavar="NAME",
    help="Limit it to servers that run as this user; repeatable.",
)
@click.option(
    "--expires",
    "expires_in",
    metavar="TIME",
    help="Lifetime, such as 12h or 30d.  [default: never]",
)
@as_json_option
@where_options
@click.pass_obj
def create(
    where: Where,
    /,
    name: str,
    *,
    scope: str,
    servers: tuple[str, ...],
    labels: tuple[str, ...],
    users: tuple[str, ...],
    expires_in: str | None,
    as_json: bool,
) -> None:
    """Create a token and print it. It is not shown again."""
    chosen = pairs_of("--label", labels)
    with connected(where) as (client, _), waiting("asking"):
        made = client.create_token(
            name, scope, servers=servers, labels=chosen, users=users, expires_in=expires_in
        )
    if as_json:
        print_json(made)
        return
    put(made.token)
    hint("save it now: it is not shown again")


@token.command(
    epilog=examples("labkeeper token ls", "labkeeper token ls --json | jq -r '.tokens[].name'")
)
@as_json_option
@where_options
@click.pass_obj
def ls(where: Where, /, *, as_json: bool) -> None:
    """List tokens, what they allow, and when they were last used."""
    with connected(where) as (client, _), waiting("asking"):
        found = client.tokens()
    if as_json:
        print_json({"tokens": found})
        return
    rows = [
        (
            one.name,
            one.scope,
            _limits(one),
            "expired" if one.expired else one.expires_at or "never",
            ago(one.last_used_at) if one.last_used_at else "never",
        )
        for one in found
    ]
    print_table(("NAME", "SCOPE", "FOR", "EXPIRES", "LAST USED"), rows)
    if not found:
        hint("no tokens but the owner's; `labkeeper token create` makes one")


@token.command(epilog=examples("labkeeper token revoke ci"))
@click.argument("name", shell_complete=token_names)
@where_options
@click.pass_obj
def revoke(where: Where, /, name: str) -> None:
    """Revoke a token immediately."""
    with connected(where) as (client, _), waiting("asking"):
        client.revoke_token(name)
    hint(f"token '{name}' is revoked")


@click.group(epilog=examples("labkeeper session ls", "labkeeper session revoke 3f9a0c21d4e7"))
def session() -> None:
    """List and revoke the sessions of browsers.

    A Lab at a port of its own asks for none.
    """


@session.command("ls", epilog=examples("labkeeper session ls --json | jq -r '.sessions[].id'"))
@as_json_option
@where_options
@click.pass_obj
def list_sessions(where: Where, /, *, as_json: bool) -> None:
    """List sessions: which Lab, who made the link, last use, and until when.

    One for all Labs began with `labkeeper dashboard`.
    """
    with connected(where) as (client, _), waiting("asking"):
        found = client.sessions()
    if as_json:
        print_json({"sessions": found})
        return
    rows = [
        (
            one.id,
            one.server or "all Labs",
            one.actor,
            ago(one.created_at),
            ago(one.last_used_at),
            one.expires_at,
        )
        for one in found
    ]
    print_table(("ID", "SERVER", "LINK BY", "SINCE", "LAST USED", "EXPIRES"), rows)
    if not found:
        hint("no sessions; `labkeeper open` begins one")


@session.command("revoke", epilog=examples("labkeeper session revoke 3f9a0c21d4e7"))
@click.argument("id_", metavar="ID", shell_complete=session_ids)
@where_options
@click.pass_obj
def revoke_session(where: Where, /, id_: str) -> None:
    """Revoke a session and those that follow from it; close their connections to Labs."""
    with connected(where) as (client, _), waiting("asking"):
        client.revoke_session(id_)
    hint(f"session '{id_}' is revoked")


@click.command(
    epilog=examples(
        "labkeeper whoami", "LABKEEPER_TOKEN=lk_... labkeeper whoami --url https://labs.example.org"
    )
)
@as_json_option
@where_options
@click.pass_obj
def whoami(where: Where, /, *, as_json: bool) -> None:
    """Show who you are, and what you may do."""
    with connected(where) as (client, _), waiting("asking"):
        found = client.me()
    if as_json:
        print_json(found)
    else:
        put(f"{found.actor}: {found.scope}, {_limits(found)}")


def _limits(found: Caller | Token) -> str:
    """Return the limits of a caller or token as text."""
    labels = [f"{key}={value}" for key, value in found.labels.items()]
    parts = (*found.servers, *labels, *(f"as {user}" for user in found.users))
    return ", ".join(parts) or "all servers"

"""The command line: commands over the client, and `serve`.

Data goes to stdout, messages go to stderr. Exit codes: 0 done; 1 the keeper or the server said no; 2 wrong usage or settings;
3 no keeper reachable; 4 no such server; 130 interrupted. What takes long to import is imported where it is used.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal, NoReturn, get_args, get_origin
from urllib.parse import urlsplit

import click

from labkeeper.core.errors import ClientError, Conflict, LabkeeperError, ServerNotFound, SettingsError, Unreachable
from labkeeper.core.lifecycle import State
from labkeeper.core.model import DEFAULT_NAME

if TYPE_CHECKING:
    from labkeeper.client import Client, Server
    from labkeeper.settings import Settings

_EXIT_CODES: Final[tuple[tuple[type[LabkeeperError], int], ...]] = (
    (SettingsError, 2),
    (Unreachable, 3),
    (ServerNotFound, 4),
    (LabkeeperError, 1),
)
_INTERRUPTED: Final = 130
_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_COLOURS: Final = {
    State.RUNNING: "green",
    State.FAILED: "red",
    State.LOST: "red",
    State.STOPPED: "bright_black",
}
"""The colour of each state; all others are on their way to one of these, and yellow."""


class _Cli(click.Group):
    """Makes exit codes and one line of text of every error."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.Abort:
            code = _INTERRUPTED
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            code = _complain(_usage(error), error.exit_code)
        except LabkeeperError as error:
            code = _complain_of(error)
        except OSError as error:
            code = _complain(f"cannot go on: {error}", 1)
        sys.exit(code or 0)


def _usage(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"; see {context.command_path} --help" if context else ""
    return " ".join(error.format_message().split()).rstrip(".") + hint


def _complain_of(error: LabkeeperError) -> int:
    """Say on stderr what went wrong, with the last log lines of the server; give the exit code."""
    code = _complain(error.message, next(code for cls, code in _EXIT_CODES if isinstance(error, cls)))
    _show_log_tail(error.details.get("log_tail") or ())
    if request_id := error.details.get("request_id"):
        _say(f"  request id: {request_id}")
    return code


def _complain(text: str, code: int) -> int:
    _say(f"{_styled('labkeeper:', sys.stderr, fg='red', bold=True)} {text}")
    return code


def _show_log_tail(lines: Sequence[str]) -> None:
    for line in lines:
        _say(f"  {_styled('|', sys.stderr, fg='bright_black')} {line}")


def _say(text: str) -> None:
    """Say something to the person at the terminal."""
    click.echo(text, err=True)


def _styled(text: str, stream: IO[str] | None, **style: Any) -> str:
    """Colour a text for a terminal, unless NO_COLOR (no-color.org) is set."""
    return click.style(text, **style) if _is_terminal(stream) and not os.environ.get("NO_COLOR") else text


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()


@dataclass(slots=True)
class _Where:
    """Where the command line looks for its keeper, as far as it was told."""

    url: str | None = None
    state_dir: str | None = None


def _note(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        setattr(context.ensure_object(_Where), str(parameter.name), value)


_Function = Callable[..., Any]


def _where(command: _Function) -> _Function:
    """Add the options that say where the keeper is; they are taken before and after the name of a command."""
    url = click.option(
        "--url", metavar="URL", expose_value=False, callback=_note, help="The keeper's URL.  [env: LABKEEPER_URL; default: found]"
    )
    state_dir = click.option(
        "--state-dir",
        metavar="PATH",
        expose_value=False,
        callback=_note,
        help="State directory of the keeper on this machine.  [env: LABKEEPER_STATE_DIR]",
    )
    return url(state_dir(command))


_as_json = click.option("--json", "as_json", is_flag=True, help="Print the API's JSON.")
_wait = click.option(
    "--wait",
    type=click.FloatRange(min=0, max=3600),
    metavar="SECONDS",
    help="Wait at most so long; 0: do not wait.  [default: to the end]",
)
_name = click.argument("name", default=DEFAULT_NAME)


def _examples(*lines: str) -> str:
    """Write the end of a help text; the first line tells click to leave the others as they are."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


@click.group(
    cls=_Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_examples(
        "labkeeper serve --start          run a keeper here, with one JupyterLab",
        "labkeeper start demo             one more JupyterLab; prints its link",
        "labkeeper ls                     what there is",
        "labkeeper logs demo -f           what it says",
        "labkeeper stop demo --delete     end it and forget it",
    ),
)
@click.version_option(package_name="labkeeper", message="%(package)s %(version)s")
@_where
@click.pass_context
def cli(context: click.Context, /) -> None:
    """JupyterLab servers on demand.

    A keeper starts, watches and stops them; these commands speak to the keeper of this machine, or to the one at --url.
    """
    context.ensure_object(_Where)


# The keeper


class _Serve(click.Command):
    """Has one flag for each setting; they are made when the command is used, since the settings take long to import."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*_settings_flags(), *super().get_params(ctx)]


@functools.cache
def _settings_flags() -> tuple[click.Option, ...]:
    from labkeeper.settings import PREFIX, Settings  # noqa: PLC0415 - late

    # A token on a command line could be read by every user of the machine.
    return tuple(
        _settings_flag(name, field, PREFIX + name.upper()) for name, field in Settings.model_fields.items() if name != "token"
    )


def _settings_flag(name: str, field: Any, variable: str) -> click.Option:
    kind, flag = field.annotation, f"--{name.replace('_', '-')}"
    default = field.get_default(call_default_factory=True)
    shown = "" if default is None else f"; default: {str(default).lower() if kind is bool else default}"
    about = f"{field.description}  [env: {variable}{shown}]"
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=about)
    if get_origin(kind) is Literal:
        return click.Option([flag, name], type=click.Choice(get_args(kind)), help=about)
    simple = {int: click.INT, float: click.FLOAT}.get(kind, click.STRING)
    return click.Option([flag, name], type=simple, metavar=_metavar(kind), help=about)


def _metavar(kind: Any) -> str:
    if kind in {int, float}:
        return "NUMBER"
    return "PATH" if "Path" in repr(kind) else "TEXT"


@cli.command(
    cls=_Serve, epilog=_examples("labkeeper serve --start", "labkeeper serve --host 0.0.0.0 --port 80 --notebook-dir /notebooks")
)
@click.option("--start", "first", is_flag=True, help="Start the server named `default` too, and print its link.")
@click.pass_obj
def serve(where: _Where, /, *, first: bool, **flags: Any) -> int:
    """Run the keeper until Ctrl-C or SIGTERM.

    Its servers are stopped with it.

    Each flag is a setting; flags win over the environment, and that over the file that LABKEEPER_CONFIG names.
    """
    from labkeeper import serve as keeper  # noqa: PLC0415 - late: it imports everything

    given = {name: value for name, value in flags.items() if value is not None}
    return keeper.run(_settings(where, **given), first=first, announce=click.echo)


# Servers


@cli.command(
    epilog=_examples(
        "labkeeper start",
        "labkeeper start demo --root-dir ~/demo --label team=blue",
        "labkeeper start spark --gateway-url http://gateway:8888",
        'echo \'{"name": "x", "gateway_headers": {"X-Team": "blue"}}\' | labkeeper start --json-spec -',
    )
)
@click.argument("name", required=False)
@click.option(
    "--root-dir", metavar="PATH", help="Directory that the Lab shows. Relative: from here, if the keeper is on this machine."
)
@click.option("--gateway-url", metavar="URL", help="Jupyter kernel gateway that runs the kernels.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="PORT", help="Port of the Lab, and no other.")
@click.option("--base-url", metavar="PATH", help="Path prefix of the Lab.")
@click.option("--default-url", metavar="PATH", help="Page to open with.  [default: /lab]")
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="Environment variable for the Lab and its kernels; repeatable.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label, to filter lists by; repeatable.")
@click.option(
    "--json-spec",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Request as JSON, `-` for stdin; the options win over it.",
)
@_wait
@_as_json
@_where
@click.pass_obj
def start(
    where: _Where, /, name: str | None, *, wait: float | None, as_json: bool, json_spec: IO[str] | None, **options: Any
) -> None:
    """Start a server, new or stopped, and print its link. NAME is `default` when not given.

    Starting what already runs is no error.
    """
    fields = _spec(json_spec) | _fields(options) | ({"name": name} if name else {})
    with _connected(where) as (client, is_here):
        if is_here and options["root_dir"]:
            fields["root_dir"] = os.path.abspath(Path(options["root_dir"]).expanduser())  # noqa: PTH100 - links are kept as given
        with _waiting(f"starting '{fields.get('name', DEFAULT_NAME)}'"):
            server = _start(client, fields, wait, as_it_was=json_spec is None and not fields.keys() - {"name"})
    _show_started(server, as_json)


def _spec(file: IO[str] | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        spec = json.load(file)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="'--json-spec'") from error
    if not isinstance(spec, dict):
        raise click.BadParameter("not a JSON object", param_hint="'--json-spec'")
    return {key.replace("-", "_"): value for key, value in spec.items()}


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    pairs = {name: _pairs(name, options.pop(name)) for name in ("env", "labels")}
    return {name: value for name, value in (options | pairs).items() if value}


def _pairs(name: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, is_pair, value = text.partition("=")
        if not is_pair:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=f"'--{name.removesuffix('s')}'")
        pairs[key] = value
    return pairs


def _start(client: Client, fields: dict[str, Any], wait: float | None, *, as_it_was: bool) -> Server:
    if as_it_was:
        # Only its name was given: whatever it was made of is to be started again, not compared with the defaults.
        with suppress(ServerNotFound):
            return client.start(fields.get("name", DEFAULT_NAME), wait=wait)
    return client.create(fields, wait=wait)


def _show_started(server: Server, as_json: bool) -> None:
    if as_json:
        _print_json(server)
    elif server.lab_url is not None:
        click.echo(server.lab_url)
    else:
        _say(f"server '{server.name}' is {server.state}; `labkeeper show {server.name}` tells more")


@cli.command(epilog=_examples("labkeeper ls --state running --label team=blue", "labkeeper ls --json | jq -r '.servers[].name'"))
@click.option(
    "--state", multiple=True, type=click.Choice([str(state) for state in State]), help="Only servers in this state; repeatable."
)
@click.option("--label", multiple=True, metavar="KEY[=VALUE]", help="Only servers with this label; repeatable, all must fit.")
@_as_json
@_where
@click.pass_obj
def ls(where: _Where, /, state: tuple[str, ...], label: tuple[str, ...], as_json: bool) -> None:
    """List servers."""
    with _connected(where) as (client, _), _waiting("asking"):
        servers = list(client.list(state=state, label=label))
    if as_json:
        _print_json({"servers": [server.model_dump(mode="json") for server in servers], "next": None})
        return
    rows = [(s.name, str(s.state), _ago(s.since), _address(s), s.root_dir, s.gateway_url or "-") for s in servers]
    _print_table(("NAME", "STATE", "SINCE", "ADDRESS", "ROOT", "GATEWAY"), rows)
    if not servers and _is_terminal(sys.stderr):
        _say("no servers; `labkeeper start` starts one" if not (state or label) else "no servers fit")


@cli.command(epilog=_examples("labkeeper show", "labkeeper show demo --json | jq .pid"))
@_name
@_as_json
@_where
@click.pass_obj
def show(where: _Where, /, name: str, as_json: bool) -> None:
    """Tell all of one server but its secrets.

    `open --print` and `--json` give those.
    """
    with _connected(where) as (client, _), _waiting("asking"):
        server = client.get(name)
    if as_json:
        _print_json(server)
        return
    facts = _facts(server)
    width = max(map(len, facts))
    for key, value in facts.items():
        click.echo(f"{key:{width}}  {value}")
    if server.failure is not None:
        _show_log_tail(server.failure.log_tail)


def _facts(server: Server) -> dict[str, str]:
    """Name what there is to say of a server; what is not so is left out."""
    facts = {
        "name": server.name,
        "state": _coloured(server.state, sys.stdout),
        "goal": server.goal,
        "since": f"{server.since} ({_ago(server.since)})",
        "address": _address(server),
        "root": server.root_dir,
        "gateway": server.gateway_url,
        "pid": server.pid,
        "launched by": server.launched_by,
        "jupyter server": server.version,
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(server.labels.items())),
        "created": server.created_at,
        "ready": server.started_at,
        "restarts": server.restarts or None,
        "failure": server.failure and f"{server.failure.message} ({server.failure.failure_class})",
        "stopped": server.stop_report and _stopped(server),
    }
    return {key: str(value) for key, value in facts.items() if value}


@cli.command(epilog=_examples("labkeeper stop", "labkeeper stop demo spark --delete"))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--force", is_flag=True, help="Kill at once instead of asking.")
@click.option("--delete", is_flag=True, help="Forget it too: its spec and its log.")
@_wait
@_as_json
@_where
@click.pass_obj
def stop(where: _Where, /, *, names: tuple[str, ...], force: bool, delete: bool, wait: float | None, as_json: bool) -> int:
    """Stop servers with their kernels.

    What they are made of is kept for the next start.

    Goes on to the next when one cannot be stopped; the exit code is that of the first that could not.
    """
    codes = []
    with _connected(where) as (client, _):
        for name in names or (DEFAULT_NAME,):
            try:
                with _waiting(f"stopping '{name}'"):
                    server = (client.delete if delete else client.stop)(name, force=force, wait=wait)
            except ClientError:
                raise
            except LabkeeperError as error:
                codes.append(_complain_of(error))
            else:
                _show_stopped(server, as_json)
    return codes[0] if codes else 0


def _show_stopped(server: Server, as_json: bool) -> None:
    if as_json:
        _print_json(server)
    else:
        click.echo(f"{server.name}: {_stopped(server)}")
    left = server.stop_report.kernels_left if server.stop_report else ()
    if left:
        _say(f"{server.name}: kernels may be left on its gateway: {', '.join(left)}")


def _stopped(server: Server) -> str:
    report = server.stop_report
    if server.state != State.STOPPED or report is None:
        return str(server.state)
    count = len(report.kernels_stopped)
    kernels = f", with {count} kernel{'s' if count > 1 else ''}" if count else ""
    means = {"none": "had ended by itself", "shutdown": "shut down", "sigterm": "ended by SIGTERM", "sigkill": "ended by SIGKILL"}
    return f"{means.get(report.method, report.method)} in {report.seconds:.1f} s{kernels}"


@cli.command(epilog=_examples("labkeeper restart demo"))
@_name
@_wait
@_as_json
@_where
@click.pass_obj
def restart(where: _Where, /, name: str, wait: float | None, as_json: bool) -> None:
    """Stop a server if it runs, start it, and print its new link."""
    with _connected(where) as (client, _), _waiting(f"restarting '{name}'"):
        server = client.restart(name, wait=wait)
    _show_started(server, as_json)


@cli.command(epilog=_examples("labkeeper logs -n 20", "labkeeper logs demo -f"))
@_name
@click.option("-f", "--follow", is_flag=True, help="Go on with each new line until the server has ended.")
@click.option("-n", "--tail", type=click.IntRange(0, 1_000_000), metavar="N", help="Lines from the end.  [default: 200]")
@_where
@click.pass_obj
def logs(where: _Where, /, name: str, follow: bool, tail: int | None) -> None:
    """Print the log of a server; it is kept after its end."""
    with _connected(where) as (client, _):
        if follow:
            for line in client.follow(name, tail=tail):
                click.echo(line)
        else:
            click.echo(client.logs(name, tail=tail), nl=False)


@cli.command("open", epilog=_examples("labkeeper open", "labkeeper open demo --print"))
@_name
@click.option("--print", "print_only", is_flag=True, help="Only print the link, with its token.")
@_where
@click.pass_obj
def open_(where: _Where, /, name: str, print_only: bool) -> None:
    """Open a running server in the browser."""
    with _connected(where) as (client, _), _waiting(f"waiting for '{name}'"):
        server = client.get(name)
        if server.state in {State.STARTING, State.BACKOFF}:
            server = client.get(name, wait_for=State.RUNNING)
    if server.lab_url is None:
        raise Conflict(f"cannot open server '{name}': it is {server.state}; `labkeeper start {name}` starts it")
    if print_only or not _browse(server.lab_url):
        click.echo(server.lab_url)


def _browse(link: str) -> bool:
    import webbrowser  # noqa: PLC0415 - late

    if webbrowser.open(link):
        return True
    _say("cannot find a browser here; open this link:")
    return False


# Beside servers


@cli.command(epilog=_examples('curl -H "Authorization: Bearer $(labkeeper token)" http://127.0.0.1:8000/api/servers'))
@_where
@click.pass_obj
def token(where: _Where, /) -> None:
    """Print the API token of the keeper on this machine."""
    settings = _settings(where)
    found = _token(settings)
    if found is None:
        raise SettingsError(f"cannot find a token in {settings.state_dir}; `labkeeper serve` makes one when it first runs there")
    click.echo(found)


@cli.command(epilog=_examples("labkeeper version --json | jq -r .version"))
@_as_json
@_where
@click.pass_obj
def version(where: _Where, /, as_json: bool) -> None:
    """Print the versions of this command and of the keeper.

    `labkeeper --version` asks no keeper.
    """
    from importlib.metadata import version as version_of  # noqa: PLC0415 - late

    ours = version_of("labkeeper")
    if not as_json:
        click.echo(f"labkeeper {ours}")
    with _connected(where) as (client, _), _waiting("asking"):
        theirs = client.version()
    if as_json:
        _print_json({"name": "labkeeper", "version": theirs, "client_version": ours, "url": client.base_url})
    else:
        click.echo(f"keeper at {client.base_url}: {theirs}")


# Finding the keeper


@contextmanager
def _connected(where: _Where) -> Iterator[tuple[Client, bool]]:
    """Find the keeper and speak to it; also say whether it is the one of this machine."""
    from labkeeper.client import Client  # noqa: PLC0415 - late
    from labkeeper.settings import keeper_url  # noqa: PLC0415 - late

    settings = _settings(where)
    named = where.url or keeper_url()
    url = named or _found_url(settings)
    is_here = named is None or urlsplit(named).hostname in _LOOPBACK
    # The generated token belongs to the keeper of this machine: it is not shown to any other.
    shown = _token(settings) if is_here else _own_token(settings)
    with Client(url, token=shown) as client:
        yield client, is_here


def _settings(where: _Where, **flags: Any) -> Settings:
    from labkeeper.settings import load  # noqa: PLC0415 - late

    if where.state_dir is not None:
        flags.setdefault("state_dir", where.state_dir)
    return load(**flags)


def _found_url(settings: Settings) -> str:
    from labkeeper.statedir import read_address  # noqa: PLC0415 - late

    host = _WILDCARDS.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return read_address(settings.state_dir) or f"http://{host}:{settings.port}"


def _own_token(settings: Settings) -> str | None:
    return settings.token.get_secret_value() if settings.token else None


def _token(settings: Settings) -> str | None:
    own = _own_token(settings)
    if own is not None:
        return own
    from labkeeper.statedir import read_token  # noqa: PLC0415 - late

    return read_token(settings.state_dir)


# Output


def _print_json(data: Any) -> None:
    plain = data.model_dump(mode="json") if hasattr(data, "model_dump") else data
    click.echo(json.dumps(plain, indent=2))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: cut to the width of a terminal and coloured there, whole and plain elsewhere."""
    if not _is_terminal(sys.stdout):
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console  # noqa: PLC0415 - late
    from rich.table import Table  # noqa: PLC0415 - late
    from rich.text import Text  # noqa: PLC0415 - late

    table = Table(*head, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[:3]:
        column.no_wrap = True
    for row in rows:
        table.add_row(
            *(Text(cell, style=_colour(cell).replace("bright_black", "dim") if i == 1 else "") for i, cell in enumerate(row))
        )
    Console(file=sys.stdout).print(table)


def _colour(state: str) -> str:
    return _COLOURS.get(State(state), "yellow") if state in set(State) else ""


def _coloured(state: str, stream: IO[str] | None) -> str:
    return _styled(str(state), stream, fg=_colour(state) or None)


def _address(server: Server) -> str:
    """Give the link without its token."""
    return server.lab_url.partition("?")[0] if server.lab_url else "-"


def _ago(instant: str) -> str:
    """Say how long ago something was, in one unit."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(instant)).total_seconds()
    except (TypeError, ValueError):
        return instant
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


@contextmanager
def _waiting(what: str, *, after: float = 1.0) -> Iterator[None]:
    """Show on a terminal that something takes time, and how long, once it took `after` seconds."""
    if not _is_terminal(sys.stderr):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_spin, args=(what, done, after), name="spinner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _spin(what: str, done: threading.Event, after: float) -> None:
    if done.wait(after):
        return
    from rich.console import Console  # noqa: PLC0415 - late
    from rich.progress import Progress, SpinnerColumn, TextColumn  # noqa: PLC0415 - late

    columns = SpinnerColumn(), TextColumn("{task.description} {task.fields[seconds]:.0f} s")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, seconds=after)
        for passed in itertools.count(1):
            if done.wait(1.0):
                return
            progress.update(task, seconds=after + passed)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log line that the terminal's encoding lacks letters for is no reason to stop.
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="labkeeper")

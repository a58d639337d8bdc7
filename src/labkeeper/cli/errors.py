"""Errors as lines on stderr and as exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, Final, NoReturn

import click

from labkeeper.cli.output import say, show_log_tail, styled
from labkeeper.core.errors import LabkeeperError, ServerNotFound, SettingsError, Unreachable

_EXIT_CODES: Final[tuple[tuple[type[LabkeeperError], int], ...]] = (
    (SettingsError, 2),
    (Unreachable, 3),
    (ServerNotFound, 4),
    (LabkeeperError, 1),
)
_INTERRUPTED: Final = 130


class Group(click.Group):
    """Turns every error into an exit code and one line of text."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command, and exit with its exit code."""
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
            code = complain_of(error)
        except OSError as error:
            _drop_output()
            code = _complain(f"cannot go on: {error}", 1)
        sys.exit(code or 0)


def _drop_output() -> None:
    """Discard unwritten output: the interpreter would retry at exit and print its own error."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _usage(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"; see {context.command_path} --help" if context else ""
    return " ".join(error.format_message().split()).rstrip(".") + hint


def complain_of(error: LabkeeperError) -> int:
    """Print an error and the server's last log lines to stderr; return the exit code."""
    code = _complain(
        error.message, next(code for cls, code in _EXIT_CODES if isinstance(error, cls))
    )
    show_log_tail(error.details.get("log_tail") or ())
    if request_id := error.details.get("request_id"):
        say(f"  request id: {request_id}")
    return code


def _complain(text: str, code: int) -> int:
    say(f"{styled('labkeeper:', sys.stderr, fg='red', bold=True)} {text}")
    return code

"""A browser for tests of the dashboard, as far as cookies, forms and the session go."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass

from fake_keeper import FakeKeeper, fake_keeper
from labkeeper.api.app import create_app
from labkeeper.core.access import Caller, Scope, Session
from labkeeper.lab_addresses import LabAddresses
from labkeeper.web.dashboard import dashboard

HOME = "http://localhost"
"""The bare host."""
_CSRF = re.compile(r'name="csrf" value="([0-9a-f]*)"')


@dataclass
class Dashboard:
    """A keeper with its dashboard."""

    running: FakeKeeper

    def __post_init__(self):
        services = self.running.services
        self.app = create_app(services, dashboard(services))

    def stranger(self):
        """Return a browser that is not signed in."""
        return Browser(self.app)

    def browser(self, scope=Scope.ADMIN, **caller):
        """Return a browser that is signed in with a scope."""
        made = self.stranger()
        made.sign_in(self.running.services.sessions, Caller("token:ada", scope, **caller))
        return made


@contextmanager
def a_dashboard(notebook_dir, **services):
    """Run a keeper whose Labs are below a path, with its dashboard."""
    with fake_keeper(notebook_dir, labs=LabAddresses("path"), **services) as running:
        yield Dashboard(running)


class Browser:
    """A browser at the bare host."""

    session: Session
    """Once it is signed in."""

    def __init__(self, app):
        self._client = app.test_client()
        self.csrf = ""

    def sign_in(self, sessions, caller):
        self.session, text = sessions.sign_in(caller)
        self._client.set_cookie("labkeeper-sign-in", text, domain="localhost")

    def get(self, path, **headers):
        """Load a page, and remember its CSRF token."""
        answer = self._client.get(path, base_url=HOME, headers=_named(headers))
        if (found := _CSRF.search(answer.text)) is not None:
            self.csrf = found[1]
        return answer

    @contextmanager
    def follow(self, path):
        """Open the stream of a page's changes; yield what reads it as far as some text."""
        with self._client.get(path, base_url=HOME, buffered=False) as answer:
            pieces = answer.iter_encoded()

            def read_until(text):
                read = ""
                while text not in read:
                    read += next(pieces).decode()
                return read

            yield read_until

    def get_stream(self, path):
        """Follow a page; the answer must be closed."""
        return self._client.get(path, base_url=HOME, buffered=False)

    def post(self, path, *, origin=HOME, headers=None, **fields):
        """Send a form with the CSRF token of the last page that had one, unless it is given."""
        return self._client.post(
            path,
            base_url=HOME,
            headers={"Origin": origin, **(headers or {})},
            data={"csrf": self.csrf, **fields},
        )


def _named(headers):
    return {name.replace("_", "-"): value for name, value in headers.items()}

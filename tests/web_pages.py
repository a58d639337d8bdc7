"""A browser for tests of the dashboard, as far as cookies, forms and the session go."""

from __future__ import annotations

import queue
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass

from fake_keeper import FakeKeeper, fake_keeper
from harness import PATIENCE
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

    def get_unread(self, path):
        """Begin to load a page; the answer must be closed."""
        return self._client.get(path, base_url=HOME, buffered=False)

    def follow(self, path):
        """Follow a page's changes."""
        return Stream(self, path)

    def post(self, path, *, origin=HOME, headers=None, **fields):
        """Send a form with the CSRF token of the last page that had one, unless it is given."""
        return self._client.post(
            path,
            base_url=HOME,
            headers={"Origin": origin, **(headers or {})},
            data={"csrf": self.csrf, **fields},
        )


class Stream:
    """The events of a page that is followed: pairs of their names and data.

    Read by a thread: its request is the current one of that thread until it ends.
    """

    def __init__(self, browser, path):
        self._browser = browser
        self._path = path
        self._events = queue.SimpleQueue()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.end()
        self._thread.join()

    def end(self):
        """Stop reading soon."""
        self._ends.set()

    def __iter__(self):
        return self

    def __next__(self):
        event = self._events.get(timeout=PATIENCE)
        if event is None:
            raise StopIteration
        return event

    def _read(self):
        text, answer = "", self._browser.get_unread(self._path)
        for piece in answer.response:
            if self._ends.is_set():
                break
            *whole, text = (text + piece.decode()).split("\n\n")
            for event in whole:
                name = re.search(r"^event: (.*)$", event, re.MULTILINE)
                data = "\n".join(re.findall(r"^data: (.*)$", event, re.MULTILINE))
                if data:
                    self._events.put(((name[1] if name else ""), data))
        answer.close()
        self._events.put(None)


def _named(headers):
    return {name.replace("_", "-"): value for name, value in headers.items()}

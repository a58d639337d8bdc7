"""An app below a Lab, run by jupyter-server-proxy in the Lab's environment: `echo.py PORT`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys

from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler


class Told(RequestHandler):
    """Answers with what it was sent."""

    def answer(self):
        told = {
            "method": self.request.method,
            "uri": self.request.uri,
            "headers": dict(self.request.headers.get_all()),
            "sha256": hashlib.sha256(self.request.body).hexdigest(),
        }
        self.finish(told)

    get = post = put = patch = delete = answer


class Events(RequestHandler):
    """Sends one event, and another one only after a POST."""

    def initialize(self, going_on):
        self.going_on = going_on

    async def get(self):
        self.set_header("Content-Type", "text/event-stream")
        self.write("data: first\n\n")
        await self.flush()
        await self.going_on.wait()
        self.write("data: second\n\n")

    def post(self):
        self.going_on.set()


class Echo(WebSocketHandler):
    """Tells the headers that opened it, and sends back whatever it receives."""

    def check_origin(self, _origin):
        return True

    def open(self):
        self.write_message(json.dumps(dict(self.request.headers.get_all())))

    def on_message(self, message):
        self.write_message(message, binary=isinstance(message, bytes))


async def main():
    routes = [
        ("/events", Events, {"going_on": asyncio.Event()}),
        ("/echo", Echo),
        ("/.*", Told),
    ]
    Application(routes).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()


asyncio.run(main())

"""A kernel of a server, as a notebook uses it: by the server's API and one websocket."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
import uuid
from typing import NamedTuple

import httpx
import psutil
import websocket

from harness import PATIENCE, kernel_websocket, until

NOT_YET = (
    "is still being loaded",
    "is not loaded yet",
    "has changed on disk since",
    "the server itself was executed",
)
"""Parts of the reasons for which a kernel is executed until a zygote has been loaded."""
RETRY_AFTER = 0.5
"""Seconds until a request to a kernel that starts is repeated."""


class Reply(NamedTuple):
    """What a notebook shows of a cell."""

    status: str
    """`ok`, `error` or `aborted`."""
    stdout: str
    stderr: str
    result: str | None
    """The plain text of its value, or None."""
    error: str | None
    """The name and value of its exception, or None."""


def call_server(server, method, path, **options):
    """Call the server's own API, and return its answer."""
    answer = httpx.request(
        method,
        f"{server['url']}api/{path}",
        headers={"Authorization": f"token {server['token']}"},
        timeout=PATIENCE,
        trust_env=False,
        **options,
    )
    assert answer.is_success, (answer.status_code, answer.text)
    return answer.json() if answer.content else None


def models(server):
    """Return the models of the server's kernels by id."""
    return {model["id"]: model for model in call_server(server, "GET", "kernels")}


def assert_launched_by(model, kernels_by, reason=None):
    """Check how a kernel was started, and that a reason against forking contains this text."""
    assert model["launched_by"] == kernels_by, model
    assert reason is None or reason in model["exec_reason"], model


def start_kernel_by(server, launched_by, reason=None, **options):
    """Start a kernel, which must be launched in this way, and for this reason if one is given."""
    if launched_by == "fork" or reason is not None:
        return until(
            lambda: _start_when_loaded(server, launched_by, reason, options), what="zygote"
        )
    return _checked(Kernel(server, **options), launched_by)


def _checked(kernel, launched_by, reason=None):
    try:
        assert_launched_by(kernel.model, launched_by, reason)
    except AssertionError:
        kernel.close()
        raise
    return kernel


def _start_when_loaded(server, launched_by, reason, options):
    """Start a kernel; return None if it was executed since its zygote is not loaded yet."""
    kernel = Kernel(server, **options)
    found = kernel.model["exec_reason"] or ""
    if reason in NOT_YET or not any(part in found for part in NOT_YET):
        return _checked(kernel, launched_by, reason)
    kernel.close()
    call_server(server, "DELETE", f"kernels/{kernel.id}")
    return None


class Kernel:
    """A new kernel of a server, with its websocket."""

    def __init__(self, server, *, name="python3", path="", kernel_id=None):
        self.server = server
        self.id = (
            kernel_id
            or call_server(server, "POST", "kernels", json={"name": name, "path": path})["id"]
        )
        self.messages = []
        """All messages that it has sent so far."""
        self._session = uuid.uuid4().hex
        self._open = contextlib.ExitStack()
        self.connect()

    # Messages

    def connect(self):
        """Connect a websocket, also in place of an earlier one."""
        self._open.close()
        self._socket = self._open.enter_context(kernel_websocket(self.server, self.id))
        self._socket.settimeout(0.2)

    def send(self, kind, content, channel="shell", **header):
        """Send a message without waiting for an answer, and return its id."""
        message_id = uuid.uuid4().hex
        self._socket.send(
            json.dumps(
                {
                    "header": {
                        "msg_id": message_id,
                        "msg_type": kind,
                        "username": "",
                        "session": self._session,
                        "version": "5.3",
                        **header,
                    },
                    "parent_header": {},
                    "metadata": {},
                    "channel": channel,
                    "buffers": [],
                    "content": content,
                }
            )
        )
        return message_id

    def wait_for(self, condition, patience=PATIENCE):
        """Return the first message that meets a condition, whether it is here yet or not."""
        end = time.monotonic() + patience
        for number in itertools.count():
            while number == len(self.messages):
                assert time.monotonic() < end, f"timed out; the last messages: {self.messages[-5:]}"
                # A server's pings would keep a longer timeout of the socket from ever passing.
                with contextlib.suppress(websocket.WebSocketTimeoutException):
                    self.messages.append(json.loads(self._socket.recv()))
            if condition(self.messages[number]):
                return self.messages[number]
        raise AssertionError

    def wait_for_kind(self, kind, message_id, patience=PATIENCE, **content):
        """Return the first message of a kind in answer to another, with this content."""
        return self.wait_for(
            lambda message: (
                message["header"]["msg_type"] == kind
                and message["parent_header"].get("msg_id") == message_id
                and content.items() <= message["content"].items()
            ),
            patience,
        )

    def answers(self, message_id):
        """Return the answers to a message that have arrived, as pairs of kind and content."""
        return [
            (message["header"]["msg_type"], message["content"])
            for message in self.messages
            if message["parent_header"].get("msg_id") == message_id
        ]

    def request(self, kind, content=None, channel="shell", **header):
        """Send a request, and return the content of its reply."""
        message_id = self.send(f"{kind}_request", content or {}, channel, **header)
        return self.wait_for_kind(f"{kind}_reply", message_id)["content"]

    # Cells

    def begin(self, code, *, allow_stdin=False, **header):
        """Request that a cell is run, without waiting for it; return the id of the message."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": allow_stdin,
            "stop_on_error": False,
        }
        return self.send("execute_request", content, **header)

    def wait_for_text(self, message_id, text):
        """Wait until a cell has printed a text."""
        self.wait_for(lambda _: text in self.printed(message_id))

    def finish(self, message_id):
        """Wait until a cell has ended, and return what the notebook shows of it."""
        status = self.wait_for_kind("execute_reply", message_id)["content"]["status"]
        self.wait_for_kind("status", message_id, execution_state="idle")
        results = [
            content["data"].get("text/plain")
            for kind, content in self.answers(message_id)
            if kind == "execute_result"
        ]
        errors = [
            f"{content['ename']}: {content['evalue']}"
            for kind, content in self.answers(message_id)
            if kind == "error"
        ]
        return Reply(
            status,
            self.printed(message_id, "stdout"),
            self.printed(message_id, "stderr"),
            results[0] if results else None,
            errors[0] if errors else None,
        )

    def show(self, code):
        """Run a cell that must succeed, and return the data that it displays, by MIME type."""
        message_id = self.begin(code)
        reply = self.finish(message_id)
        assert reply.status == "ok", reply
        return [
            content["data"] for kind, content in self.answers(message_id) if kind == "display_data"
        ]

    def execute(self, code, answers=()):
        """Run a cell, and answer its questions for input in turn."""
        message_id = self.begin(code, allow_stdin=bool(answers))
        prompts = []
        for answer in answers:
            prompt = self.wait_for(
                lambda message: (
                    message["header"]["msg_type"] == "input_request"
                    and message["parent_header"].get("msg_id") == message_id
                    and message not in prompts
                )
            )
            prompts.append(prompt)
            self.send("input_reply", {"value": answer}, "stdin")
        return self.finish(message_id)

    def value(self, code):
        """Run a cell that must succeed, and return its value, of builtin types."""
        reply = self.execute(f"{code}\n")
        assert reply.status == "ok", reply
        return eval(reply.result)

    def run(self, code):
        """Run a cell that must succeed without a word on stderr, and return its output."""
        reply = self.execute(code)
        assert (reply.status, reply.stderr) == ("ok", ""), reply
        return reply.stdout

    def printed(self, message_id, name="stdout"):
        """Return what a cell has printed so far."""
        return "".join(
            content["text"]
            for kind, content in self.answers(message_id)
            if kind == "stream" and content["name"] == name
        )

    # Its life

    @property
    def model(self):
        return models(self.server).get(self.id)

    @property
    def process(self):
        return psutil.Process(self.value("__import__('os').getpid()"))

    def interrupt(self):
        call_server(self.server, "POST", f"kernels/{self.id}/interrupt")

    def restart(self, *, reconnect=True):
        """Restart it, and connect again, as the Lab does."""
        call_server(self.server, "POST", f"kernels/{self.id}/restart")
        if reconnect:
            self.connect()

    def wait_for_status(self, state):
        """Wait for a status that the server itself reports, such as `restarting`."""
        self.wait_for(
            lambda message: (
                message["header"]["msg_type"] == "status"
                and message["content"]["execution_state"] == state
            )
        )

    def wait_until_responsive(self):
        """Wait until it answers on all channels.

        After a crash the new process may take a request before the server's subscription to its
        output has reached it, so one request may not do.
        """
        until(self._answers_a_request, what="the kernel to answer")

    def _answers_a_request(self):
        message_id = self.send("kernel_info_request", {})
        with contextlib.suppress(AssertionError):
            self.wait_for_kind("status", message_id, RETRY_AFTER, execution_state="idle")
            return self.wait_for_kind("kernel_info_reply", message_id, RETRY_AFTER)
        return None

    def shutdown(self):
        """End it through the server, and wait for the end."""
        self.close()
        call_server(self.server, "DELETE", f"kernels/{self.id}")
        until(lambda: self.model is None, what="the server to forget the kernel")

    def close(self):
        """Close the websocket; the kernel lives on."""
        self._open.close()

"""The debugger of a kernel, as the Lab uses it."""

from __future__ import annotations

import itertools


class Debugger:
    """A debugger as the Lab's: requests on the control channel, events among the output."""

    def __init__(self, kernel):
        self._kernel = kernel
        self._numbers = itertools.count(1)
        self._seen = 0

    def request(self, command, **arguments):
        content = {
            "type": "request",
            "seq": next(self._numbers),
            "command": command,
            "arguments": arguments,
        }
        reply = self._kernel.request("debug", content, "control")
        assert reply["success"], reply
        return reply.get("body", {})

    def begin(self):
        self.request("initialize", clientID="test", adapterID="", pathFormat="path")
        self.request("attach")

    def wait_for(self, event):
        """Return the next event of this name, after those that were waited for before."""
        before = self._seen
        message = self._kernel.wait_for(
            lambda message: (
                message["header"]["msg_type"] == "debug_event"
                and message["content"]["event"] == event
                and self._kernel.messages.index(message) >= before
            )
        )
        self._seen = self._kernel.messages.index(message) + 1
        return message["content"].get("body", {})

    def stop_at(self, line, code):
        """Set a breakpoint in a cell, run it, and return the cell and the thread that stops."""
        path = self.request("dumpCell", code=code)["sourcePath"]
        found = self.request(
            "setBreakpoints",
            source={"path": path},
            breakpoints=[{"line": line}],
            sourceModified=False,
        )
        assert [point["verified"] for point in found["breakpoints"]] == [True]
        self.request("configurationDone")
        cell = self._kernel.begin(code)
        stopped = self.wait_for("stopped")
        assert stopped["reason"] == "breakpoint"
        return cell, stopped["threadId"]

    def variables(self, thread):
        """Return the function that a thread is in, its line, and its local variables."""
        frame = self.request("stackTrace", threadId=thread)["stackFrames"][0]
        scopes = self.request("scopes", frameId=frame["id"])["scopes"]
        (local,) = [scope["variablesReference"] for scope in scopes if scope["name"] == "Locals"]
        found = self.request("variables", variablesReference=local)["variables"]
        return (
            frame["name"],
            frame["line"],
            {item["name"]: item["value"] for item in found if item["name"].islower()},
        )

"""The Lab's debugger: breakpoints in cells."""

from __future__ import annotations

import pytest

from debugger import Debugger

CODE = """def twice(number):
    result = number * 2
    return result
print(twice(21))
"""


@pytest.fixture
def debugger(kernel):
    return Debugger(kernel)


def test_debugger_stops_shows_variables_and_continues_again_and_again(kernel, debugger):
    assert debugger.request("debugInfo")["isStarted"] is False
    for _ in range(2):
        debugger.begin()
        assert debugger.request("debugInfo")["isStarted"] is True
        cell, thread = debugger.stop_at(3, CODE)
        name, line, found = debugger.variables(thread)
        assert (name, line) == ("twice", 3)
        assert (found["number"], found["result"]) == ("21", "42")
        debugger.request("continue", threadId=thread)
        assert kernel.finish(cell).stdout == "42\n"
        debugger.request("disconnect", restart=False, terminateDebuggee=False)
        assert kernel.run(CODE) == "42\n"


def test_debugger_steps(kernel, debugger):
    debugger.begin()
    cell, thread = debugger.stop_at(2, CODE)
    assert debugger.variables(thread)[1:] == (2, {"number": "21"})
    debugger.request("next", threadId=thread)
    assert debugger.wait_for("stopped")["reason"] == "step"
    assert debugger.variables(thread)[1:] == (3, {"number": "21", "result": "42"})
    debugger.request("continue", threadId=thread)
    assert kernel.finish(cell).stdout == "42\n"


def test_debugger_shows_the_variables_of_the_notebook(kernel, debugger):
    kernel.run("x = 42")
    debugger.begin()
    found = debugger.request("inspectVariables")["variables"]
    assert {"name": "x", "value": "42"}.items() <= {
        key: value for item in found if item["name"] == "x" for key, value in item.items()
    }.items()


def test_breakpoint_stops_in_the_attached_debugger(kernel, debugger):
    debugger.begin()
    debugger.request("configurationDone")
    cell = kernel.begin("def stops():\n    x = 42\n    breakpoint()\n    return x\nprint(stops())")
    thread = debugger.wait_for("stopped")["threadId"]
    assert debugger.variables(thread)[2] == {"x": "42"}
    debugger.request("continue", threadId=thread)
    assert kernel.finish(cell).stdout == "42\n"


def test_kernel_can_be_restarted_and_debugged_again(kernel, debugger):
    debugger.begin()
    _, thread = debugger.stop_at(3, CODE)
    assert debugger.variables(thread)[0] == "twice"
    kernel.restart()
    assert debugger.request("debugInfo")["isStarted"] is False
    debugger.begin()
    cell, thread = debugger.stop_at(3, CODE)
    debugger.request("continue", threadId=thread)
    assert kernel.finish(cell).stdout == "42\n"

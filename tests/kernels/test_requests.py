"""What a notebook asks a kernel for besides running cells."""

from __future__ import annotations

import uuid

import pytest


@pytest.fixture
def kernel(shared_kernel):
    return shared_kernel


def test_kernel_info_describes_the_interpreter(kernel):
    info = kernel.request("kernel_info")
    version = kernel.value("'.'.join(map(str, __import__('sys').version_info[:3]))")
    assert (info["status"], info["implementation"]) == ("ok", "ipython")
    assert info["language_info"]["version"] == version
    assert {"debugger", "kernel subshells"} <= set(info["supported_features"])


def test_completion_knows_names_attributes_and_files(start, server, directory):
    (directory / "notes_of_today.txt").touch()
    kernel = start(server, path=directory.name)
    kernel.run("import os\nsome_long_name = 1")

    def completions(code):
        return kernel.request("complete", {"code": code, "cursor_pos": len(code)})["matches"]

    assert "some_long_name" in completions("some_lo")
    assert "path" in completions("os.pat")
    assert any("notes_of_today.txt" in match for match in completions("open('notes_of"))
    assert "%timeit" in completions("%time")


def test_inspection_shows_signature_and_documentation(kernel):
    kernel.run("def add(one, other):\n    'Return the sum.'\n    return one + other")
    found = kernel.request("inspect", {"code": "add", "cursor_pos": 3, "detail_level": 0})
    assert found["found"] is True
    assert "Signature: add(one, other)" in plain(found["data"]["text/plain"])
    assert "Return the sum." in found["data"]["text/plain"]
    source = kernel.request("inspect", {"code": "add", "cursor_pos": 3, "detail_level": 1})
    assert "return one + other" in plain(source["data"]["text/plain"])


def plain(text):
    """Return a text without the escape sequences of colours."""
    return "".join(
        piece.partition("m")[2] if n else piece for n, piece in enumerate(text.split("\x1b["))
    )


def test_code_is_classified_as_complete_or_not(kernel):
    statuses = {
        code: kernel.request("is_complete", {"code": code})["status"]
        for code in ("1 + 1", "for x in range(3):", "1 +* 1")
    }
    assert statuses == {
        "1 + 1": "complete",
        "for x in range(3):": "incomplete",
        "1 +* 1": "invalid",
    }


def test_history_has_own_cells_and_those_of_earlier_kernels(start, server):
    kernel = start(server)
    mark = uuid.uuid4().hex
    for number in range(3):
        kernel.run(f"x = '{mark}', {number}")
    tail = {"hist_access_type": "tail", "n": 3, "output": False, "raw": True}
    own = kernel.request("history", tail)["history"]
    assert [source for _, _, source in own] == [f"x = '{mark}', {number}" for number in range(3)]
    assert len({session for session, _, _ in own}) == 1
    assert [line for _, line, _ in own] == [1, 2, 3]
    kernel.shutdown()
    other = start(server)
    search = {"hist_access_type": "search", "pattern": f"*{mark}*", "n": 10, "raw": True}
    found = other.request("history", search | {"output": False})["history"]
    assert [source for _, _, source in found] == [source for _, _, source in own]
    other.run("pass")
    assert other.value("get_ipython().history_manager.session_number") > found[0][0]


def test_two_kernels_have_different_history_sessions(kernel, start, server):
    code = "get_ipython().history_manager.session_number"
    assert kernel.value(code) != start(server).value(code)


def test_subshell_runs_cells_while_the_kernel_is_busy(kernel):
    kernel.run("import threading\ngo = threading.Event()")
    created = kernel.request("create_subshell", channel="control")
    assert created["status"] == "ok"
    subshell = created["subshell_id"]
    assert kernel.request("list_subshell", channel="control")["subshell_id"] == [subshell]
    busy = kernel.begin("print('begun', flush=True)\nprint(go.wait(60))")
    kernel.wait_for_text(busy, "begun")
    beside = kernel.begin("go.set()\nprint(threading.current_thread().name)", subshell_id=subshell)
    assert kernel.finish(beside).stdout == f"subshell-{subshell}\n"
    assert kernel.finish(busy).stdout == "begun\nTrue\n"
    deleted = kernel.request("delete_subshell", {"subshell_id": subshell}, "control")
    assert deleted["status"] == "ok"
    assert kernel.request("list_subshell", channel="control")["subshell_id"] == []


def test_control_channel_answers_while_a_cell_runs(kernel):
    cell = kernel.begin("print('begun', flush=True)\nwhile True: pass")
    kernel.wait_for_text(cell, "begun")
    usage = kernel.request("usage", channel="control")
    assert usage["pid"] == kernel_pid(kernel)
    assert usage["kernel_memory"] > 10 * 2**20
    kernel.interrupt()
    assert kernel.finish(cell).status == "error"


def kernel_pid(kernel):
    """Return the pid that a kernel reports to a debugger, even while a cell runs."""
    return kernel.request("usage", channel="control")["pid"]


# Comms


def test_comm_that_the_notebook_opens_gets_and_sends_messages(kernel):
    kernel.run(
        "def opened(comm, message):\n"
        "    def double(message):\n"
        "        comm.send({'twice': message['content']['data']['n'] * 2})\n"
        "    comm.on_msg(double)\n"
        "    comm.on_close(lambda message: print('closed'))\n"
        "    comm.send({'opened with': message['content']['data']})\n"
        "get_ipython().kernel.comm_manager.register_target('echo', opened)"
    )
    comm = uuid.uuid4().hex
    opened = kernel.send("comm_open", {"comm_id": comm, "target_name": "echo", "data": {"n": 1}})
    told = kernel.wait_for_kind("comm_msg", opened)["content"]
    assert told == {"comm_id": comm, "data": {"opened with": {"n": 1}}}
    sent = kernel.send("comm_msg", {"comm_id": comm, "data": {"n": 21}})
    assert kernel.wait_for_kind("comm_msg", sent)["content"]["data"] == {"twice": 42}
    comms = kernel.request("comm_info", {"target_name": "echo"})["comms"]
    assert comms == {comm: {"target_name": "echo"}}
    closed = kernel.send("comm_close", {"comm_id": comm, "data": {}})
    kernel.wait_for_text(closed, "closed\n")
    assert kernel.request("comm_info")["comms"] == {}


def test_comm_that_a_cell_opens_gets_and_sends_messages(kernel):
    cell = kernel.begin(
        "from comm import create_comm\n"
        "got = []\n"
        "ours = create_comm(target_name='notebook', data={'n': 1})\n"
        "ours.on_msg(lambda message: got.append(message['content']['data']))"
    )
    opened = kernel.wait_for_kind("comm_open", cell)["content"]
    assert (opened["target_name"], opened["data"]) == ("notebook", {"n": 1})
    sent = kernel.send("comm_msg", {"comm_id": opened["comm_id"], "data": {"n": 2}})
    kernel.wait_for_kind("status", sent, execution_state="idle")
    assert kernel.value("got") == [{"n": 2}]
    cell = kernel.begin("ours.close()")
    assert kernel.wait_for_kind("comm_close", cell)["content"]["comm_id"] == opened["comm_id"]

"""Everything that a cell can find out of its process is as in an executed kernel."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import pytest

SNAPSHOT = (Path(__file__).parent / "snapshot.py").read_text()
PARTS = ["process", "status", "descriptors", "interpreter", "libraries", "ipython"]


def normal(text, kernel):
    """Replace what differs between any two kernels, or between their servers."""
    server = kernel.server
    for given, name in (
        (kernel.id, "KERNEL"),
        (server["url"], "URL"),
        (str(server["pid"]), "PID"),
        (str(server["port"]), "PORT"),
    ):
        text = text.replace(given, name)
    # The mark in the environment is filled with spaces.
    return re.sub(rf"\b{server['name']}\b *", "SERVER", text)


def snapshot(kernel, mark):
    """Return what a kernel reports in its first cell, by part and name."""
    parts = ", ".join(f"'{part}': {part}()" for part in PARTS)
    code = f"{SNAPSHOT}\nprint('{mark}', json.dumps({{{parts}}}, default=str))"
    shown = kernel.run(code).partition(mark)[2]
    parts = json.loads(normal(shown, kernel))
    return {f"{part}: {what}": value for part in parts for what, value in parts[part].items()}


@pytest.fixture
def executed(kernel_servers, kernels_by, start):
    """An executed kernel to compare with, of another server if the tested one is forked."""
    return start(kernel_servers.lasting("exec"), launched_by="exec")


def test_state_of_the_process_is_that_of_an_executed_kernel(kernel, executed):
    mark = uuid.uuid4().hex
    ours, theirs = snapshot(kernel, mark), snapshot(executed, mark)
    if kernel.model["launched_by"] == "fork":
        # Its parent is the zygote, so it has a handle of its server, and the pipe that it reports
        # its ports to: it ends if either closes.
        theirs["process: parent"] = str(kernel.process.ppid())
        theirs["descriptors: kinds"] |= {
            "anon_inode:[pidfd]": 1,
            "pipe": theirs["descriptors: kinds"]["pipe"] + 1,
        }
    assert ours.keys() == theirs.keys()
    differences = {
        what: {"here": value, "executed": theirs[what]}
        for what, value in ours.items()
        if value != theirs[what]
    }
    assert not differences, json.dumps(differences, indent=1)


LIST_MODULES = "sorted(__import__('sys').modules)"


def test_no_module_is_loaded_that_an_executed_kernel_lacks(kernel, executed):
    """Otherwise a cell would find a module, or state of it, that it has not imported."""
    ours, theirs = set(kernel.value(LIST_MODULES)), set(executed.value(LIST_MODULES))
    assert {"ipykernel.ipkernel", "IPython", "zmq"} <= ours
    assert ours - theirs == set()


def test_names_of_the_notebook_are_those_of_an_executed_kernel(kernel, executed):
    for code in (
        "sorted(globals())",
        "sorted(dir())",
        "get_ipython().run_line_magic('who_ls', '')",
    ):
        assert kernel.value(code) == executed.value(code)


def test_pickle_and_inspect_know_functions_of_the_notebook(kernel):
    kernel.run("import inspect, pickle\ndef add(one, other):\n    return one + other")
    assert (
        kernel.value("inspect.getsource(add)") == "def add(one, other):\n    return one + other\n"
    )
    assert kernel.value("pickle.loads(pickle.dumps(add)) is add") is True
    assert kernel.value("(add.__module__, __name__)") == ("__main__", "__main__")


def test_kernel_has_the_limits_and_control_groups_of_its_server(start_server, start):
    server = start_server()
    pid = start(server).process.pid
    for file in ("limits", "cgroup", "oom_score_adj"):
        of_kernel, of_server = (Path(f"/proc/{which}/{file}") for which in (pid, server["pid"]))
        assert of_kernel.read_text() == of_server.read_text(), file

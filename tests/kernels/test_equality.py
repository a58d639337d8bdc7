"""Everything that a cell can find out of its process is as in an executed kernel."""

from __future__ import annotations

import uuid
from pathlib import Path

from kernel_state import assert_same, expect_of_forked, snapshot


def test_state_of_the_process_is_that_of_an_executed_kernel(kernel, executed):
    mark = uuid.uuid4().hex
    ours, theirs = snapshot(kernel, mark), snapshot(executed, mark)
    if kernel.model["launched_by"] == "fork":
        expect_of_forked(kernel, theirs)
    assert_same(ours, theirs)


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

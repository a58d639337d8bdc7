"""Configuration of IPython, of kernelspecs and of Jupyter applies."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

# IPython


def test_startup_files_run_in_order_before_the_first_cell(kernel_servers, profile, start, server):
    startup = profile / "startup"
    (startup / "00-first.py").write_text("import os\norder = ['first']\npid = os.getpid()")
    (startup / "50-second.py").write_text("order.append('second')\nprint('of startup')")
    kernel = start(server)
    assert kernel.value("order") == ["first", "second"]
    # Its output belongs to no cell.
    assert kernel.run("print(pid == os.getpid())") == "True\n"


def test_changed_startup_file_applies_to_the_next_kernel(profile, start, server):
    file = profile / "startup" / "00-value.py"
    for value in (1, 2):
        file.write_text(f"value = {value}")
        os.utime(file, ns=(time.time_ns(), value))
        assert start(server).value("value") == value
    file.unlink()
    assert start(server).execute("value").error == "NameError: name 'value' is not defined"


def test_ipython_configuration_applies(profile, start, server):
    (profile / "ipython_config.py").write_text(
        "c.InteractiveShellApp.exec_lines = ['import math', 'value = math.floor(42.5)']\n"
        "c.InteractiveShell.ast_node_interactivity = 'all'\n"
        "c.InteractiveShellApp.extensions = ['autoreload']\n"
    )
    (profile / "ipython_kernel_config.py").write_text(
        "c.IPythonKernel.help_links = [{'text': 'ours', 'url': 'http://ours'}]\n"
    )
    kernel = start(server)
    assert kernel.value("value") == 42
    cell = kernel.begin("1\n2")
    kernel.finish(cell)
    shown = [
        content["data"]["text/plain"]
        for kind, content in kernel.answers(cell)
        if kind == "execute_result"
    ]
    assert shown == ["1", "2"]
    assert "autoreload" in kernel.value("sorted(get_ipython().magics_manager.magics['line'])")
    assert kernel.request("kernel_info")["help_links"] == [{"text": "ours", "url": "http://ours"}]


@pytest.mark.parametrize(
    "broken", ["c.InteractiveShellApp.exec_lines = ['1 / 0']", "1 / 0", "not Python"]
)
def test_kernel_starts_with_a_broken_configuration(profile, start, server, broken):
    (profile / "ipython_config.py").write_text(broken)
    assert start(server).value("6 * 7") == 42


def test_broken_startup_file_ends_the_startup_and_not_the_kernel(profile, start, server):
    (profile / "startup" / "00-broken.py").write_text("before = 1\n1 / 0")
    (profile / "startup" / "50-value.py").write_text("value = 42")
    kernel = start(server)
    assert kernel.value("before") == 1
    assert kernel.execute("value").error == "NameError: name 'value' is not defined"


def test_ipythondir_of_the_server_is_used(start_server, start, tmp_path):
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "value.py").write_text("value = 42")
    kernel = start(start_server(env={"IPYTHONDIR": str(tmp_path)}))
    assert kernel.value("value") == 42
    assert kernel.value("get_ipython().ipython_dir") == str(tmp_path)
    assert (tmp_path / "profile_default" / "history.sqlite").exists()


# Kernelspecs and environment


def test_variables_of_a_kernelspec_arrive(add_kernelspec, start, server):
    name = add_kernelspec(env={"OWN_VALUE": "42", "OWN_PATH": "/own:${PATH}"})
    kernel = start(server, name=name)
    path = kernel.value("import os\nos.environ['PATH']")
    assert kernel.value("(os.environ['OWN_VALUE'], os.environ['OWN_PATH'])") == (
        "42",
        f"/own:{path}",
    )
    assert kernel.run("!printenv OWN_VALUE") == "42\r\n"
    assert start(server).value("'OWN_VALUE' in __import__('os').environ") is False


def test_kernel_env_of_the_server_arrives_and_env_as_well(start_server, start):
    server = start_server(env={"OF_ALL": "1"}, kernel_env={"OF_KERNELS": "2"})
    kernel = start(server)
    assert kernel.value("import os\n[os.environ[name] for name in ('OF_ALL', 'OF_KERNELS')]") == [
        "1",
        "2",
    ]


def test_time_zone_of_a_kernelspec_applies(add_kernelspec, start, server):
    name = add_kernelspec(env={"TZ": "Asia/Kathmandu"})
    assert start(server, name=name).value("import time\ntime.strftime('%z')") == "+0545"


def test_display_name_and_kernelspec_are_reported(add_kernelspec, start, server):
    name = add_kernelspec(display_name="Own")
    kernel = start(server, name=name)
    assert kernel.model["name"] == name


AT_START = {
    "OMP_NUM_THREADS": ("3", "os.environ['OMP_NUM_THREADS']", "3"),
    "LANG": ("C", "os.environ['LANG']", "C"),
    "PYTHONPATH": ("/own/path", "'/own/path' in __import__('sys').path", True),
    "PYTHONHASHSEED": ("0", "hash('text')", None),
    "LD_PRELOAD": ("", "os.environ['LD_PRELOAD']", ""),
}
"""Variables that take effect when a program starts: a value, code that shows it, what it shows."""


@pytest.mark.parametrize("variable", AT_START)
def test_variable_that_takes_effect_when_a_program_starts_needs_an_executed_kernel(
    add_kernelspec, start, server, kernels_by, variable
):
    value, code, expected = AT_START[variable]
    name = add_kernelspec(env={variable: value})
    reason = variable if kernels_by == "fork" else None
    kernel = start(server, name=name, launched_by="exec", reason=reason)
    found = kernel.value(f"import os\n{code}")
    if expected is None:
        expected = start(server, name=name, launched_by="exec").value(f"import os\n{code}")
    assert found == expected


def test_kernelspec_with_another_program_is_executed(add_kernelspec, start, server, directory):
    """Only what is known to start ipykernel can be forked."""
    program = directory / "program"
    program.write_text(
        f'#!/bin/sh\nexport BY_PROGRAM=42\nexec "{sys.executable}" -m ipykernel_launcher "$@"\n'
    )
    program.chmod(0o755)
    name = add_kernelspec(argv=[str(program), "-f", "{connection_file}"])
    kernel = start(server, name=name, launched_by="exec")
    assert kernel.value("__import__('os').environ['BY_PROGRAM']") == "42"


# Transport

TRANSPORTS = {
    "tcp": ("", "tcp", False),
    "ipc": ("c.KernelManager.transport = 'ipc'", "ipc", False),
    "encrypted": ("c.KernelManager.transport_encryption = 'required'", "tcp", True),
}
ASK = """
import time, zmq
get_ipython().kernel.stdin_socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
answer = None
while answer is None:
    try:
        answer = input()
    except zmq.ZMQError as error:
        assert error.errno == zmq.EHOSTUNREACH, error
        time.sleep(0.05)
answer
"""
"""Ask once the server can hear the question.

The sockets of a server whose kernel did not listen at first connect at different times, tenths of a
second apart. Without the option, ZeroMQ drops a question if the socket for it is not connected yet.
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport_works(start_server, start, connection_file, tmp_path, transport):
    config, kind, encrypted = TRANSPORTS[transport]
    (tmp_path / "jupyter_server_config.py").write_text(config)
    kernel = start(start_server(env={"JUPYTER_CONFIG_DIR": str(tmp_path)}))
    for _ in range(2):
        assert kernel.run("print('text')") == "text\n"
        assert kernel.execute(ASK, ["42"]).result == "'42'"
        assert kernel.request("usage", channel="control")["pid"] == kernel.process.pid
        known = json.loads(connection_file(kernel).read_text())
        assert known["transport"] == kind
        assert ("curve_publickey" in known) is encrypted
        kernel.restart()

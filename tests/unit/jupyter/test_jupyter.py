"""What the keeper configures in Jupyter, and how it interprets responses, records and logs."""

from __future__ import annotations

import http.server
import json
import resource
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from harness import free_port
from labkeeper.core.errors import BackendTimeout, BackendUnavailable
from labkeeper.core.server import (
    Activity,
    Endpoint,
    Exit,
    FailureClass,
    KernelUse,
    OwnKernel,
    Session,
    TerminalUse,
)
from labkeeper.core.spec import Gateway, ServerName, ServerSpec
from labkeeper.jupyter.client import JupyterClient
from labkeeper.jupyter.config import base_config, launch_config, launch_environment
from labkeeper.jupyter.failures import cause_of
from labkeeper.jupyter.records import read_info, read_kernels, url_of

SPEC = ServerSpec(ServerName("x"), "/notebooks", base_url="/b/", env={"A": "1"})
GATED = ServerSpec(
    ServerName("x"),
    "/notebooks",
    gateway=Gateway(
        "http://g:8888/http-api",
        "ws://g:8888/http-api",
        auth_token="gateway secret",
        headers={"X": "header secret"},
        request_timeout=10.0,
        ca_certs="/ca.pem",
    ),
)


def endpoint(port, hostname="127.0.0.1"):
    return Endpoint(f"http://127.0.0.1:{port}/", "t", "/", hostname, port, False, False, "/n")


def test_the_configuration_has_the_settings_of_the_keeper_and_the_spec(tmp_path):
    config = launch_config(GATED, token="own secret", port=8888, ca_bundle=tmp_path / "ca.pem")
    assert config["ServerApp"]["port_retries"] == 0
    assert config["ServerApp"]["port"] == 8888
    assert config["ServerApp"]["root_dir"] == GATED.root_dir
    assert config["IdentityProvider"] == {"token": "own secret"}
    assert config["GatewayClient"]["url"] == "http://g:8888/http-api"
    assert config["GatewayClient"]["ws_url"] == "ws://g:8888/http-api"
    assert config["GatewayClient"]["ca_certs"] == str(tmp_path / "ca.pem")
    assert json.loads(config["GatewayClient"]["headers"]) == {"X": "header secret"}
    assert "GatewayClient" not in launch_config(SPEC, token="t", port=1, ca_bundle=None)


def test_options_are_added_but_cannot_override_the_keepers_settings():
    options = {
        "ServerApp.terminals_enabled": False,
        "ServerApp.port_retries": 9,
        "LabApp.extension_manager": 0,
        "New.trait": 1.5,
    }
    config = launch_config(
        replace(SPEC, jupyter_options=options), token="t", port=1, ca_bundle=None
    )
    assert config["ServerApp"]["terminals_enabled"] is False
    assert config["ServerApp"]["port_retries"] == 0
    assert config["LabApp"]["extension_manager"] == "readonly"
    assert config["New"] == {"trait": 1.5}
    assert type(config) is dict


def test_a_certificate_enables_tls():
    files = Path("/etc/lab.pem"), Path("/etc/lab.key")
    chosen = launch_config(SPEC, token="t", port=1, ca_bundle=None, certificate=files)["ServerApp"]
    assert (chosen["certfile"], chosen["keyfile"]) == ("/etc/lab.pem", "/etc/lab.key")
    assert "certfile" not in launch_config(SPEC, token="t", port=1, ca_bundle=None)["ServerApp"]


def test_the_base_configuration_has_no_secrets_and_is_not_modified():
    before = base_config()
    launch_config(GATED, token="own secret", port=8888, ca_bundle=None)
    assert base_config() == before
    assert "secret" not in str(before)


def test_the_environment_is_inherited_without_private_variables(tmp_path):
    own = {
        "PATH": "/bin",
        "LABKEEPER_TOKEN": "secret",
        "JUPYTER_TOKEN": "secret",
        "JUPYTER_GATEWAY_URL": "http://other",
        "JUPYTERHUB_API_TOKEN": "secret",
        "JUPYTER_PATH": "/kept",
    }
    env = launch_environment(SPEC, own, runtime_dir=tmp_path, ca_bundle=None)
    assert env == {
        "PATH": "/bin",
        "JUPYTER_PATH": "/kept",
        "A": "1",
        "JUPYTER_RUNTIME_DIR": str(tmp_path),
    }


def test_gateway_options_that_jupyter_reads_from_the_environment_are_set(tmp_path):
    env = launch_environment(GATED, {}, runtime_dir=tmp_path, ca_bundle=tmp_path / "ca.pem")
    assert env["SSL_CERT_FILE"] == str(tmp_path / "ca.pem")
    assert env["KERNEL_LAUNCH_TIMEOUT"] == "8"


@pytest.mark.parametrize(
    "content", [None, "", "{", "{}", '{"pid": 8}', json.dumps({"pid": 7, "base_url": "/"})]
)
def test_an_incomplete_info_file_is_ignored(tmp_path, content):
    if content is not None:
        (tmp_path / "jpserver-7.json").write_text(content)
    assert read_info(tmp_path, 7) is None


def test_an_info_file_of_another_pid_is_ignored(tmp_path):
    info = {
        "base_url": "/",
        "hostname": "h",
        "password": False,
        "pid": 8,
        "port": 1,
        "root_dir": "/n",
        "secure": False,
        "token": "t",
    }
    path = tmp_path / "jpserver-7.json"
    path.write_text(json.dumps(info | {"url": "http://h:1/", "sock": ""}))
    assert read_info(tmp_path, 7) is None
    path.write_text(json.dumps(info | {"url": "http://h:1/", "sock": "", "pid": 7}))
    assert read_info(tmp_path, 7).root_dir == "/n"


@pytest.mark.parametrize(
    ("hostname", "host", "url"),
    [
        ("0.0.0.0", None, "http://127.0.0.1:1/"),
        ("::", None, "http://[::1]:1/"),
        ("10.0.0.1", None, "http://10.0.0.1:1/"),
        ("0.0.0.0", "lab.example", "http://lab.example:1/"),
    ],
)
def test_the_url_of_a_server_uses_a_reachable_address(hostname, host, url):
    assert url_of(endpoint(1, hostname), host) == url


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (
            (
                "[C 2026-01-01 00:00:00.000 ServerApp] ERROR: could not be started"
                " because port 8888 is already in use"
            ),
            "port-in-use",
        ),
        ("OSError: [Errno 28] No space left on device", "disk-full"),
        ("ModuleNotFoundError: No module named 'x'", "import-error"),
        ("traitlets.traitlets.TraitError: The 'port' trait", "config-error"),
        ("bad configuration: cannot load /x", "config-error"),
        (
            (
                "[C 2026 ServerApp] ERROR: the Jupyter server could not be started"
                " because port 8888 is not available."
            ),
            "port-in-use",
        ),
        ("something else", "other"),
    ],
)
def test_the_failure_class_comes_from_the_last_log_lines(line, kind):
    found, message = cause_of(Exit(code=1), ["a line before", line])
    assert found == kind
    assert message
    assert not message.startswith("[C")


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (
            [
                (
                    "[I 2026-01-01 00:00:00.000 ServerApp] notebook_shim |"
                    " extension was successfully loaded."
                )
            ],
            "",
        ),
        (
            [
                "[D 2026-01-01 00:00:00.000 LabApp] Paths used",
                "",
                "[I 2026-01-01 00:00:00.000 LabApp] loaded",
            ],
            "",
        ),
        (
            [
                "[C 2026-01-01 00:00:00.000 ServerApp] ",
                "    To access the server, open",
                "        http://127.0.0.1:1/lab",
            ],
            "",
        ),
        (
            [
                "[E 2026-01-01 00:00:00.000 LabApp] it broke",
                "[I 2026-01-01 00:00:00.000 LabApp] loaded",
            ],
            "it broke",
        ),
        (
            ["[W 2026-01-01 00:00:00.000 LabApp] odd", "[I 2026-01-01 00:00:00.000 LabApp] loaded"],
            "",
        ),
        (["[I 2026-01-01 00:00:00.000 LabApp] Permission denied: no matter"], ""),
        (
            ["[I 2026-01-01 00:00:00.000 LabApp] loaded", "Fatal Python error: Aborted"],
            "Fatal Python error: Aborted",
        ),
    ],
)
def test_routine_log_lines_are_not_a_cause(tail, message):
    assert cause_of(Exit(code=7), tail) == (FailureClass.OTHER, message)


def test_the_log_of_a_killed_server_has_no_cause():
    assert cause_of(Exit(signal="SIGKILL"), ["Address already in use"]) == (FailureClass.KILLED, "")
    assert cause_of(Exit(code=1), []) == (FailureClass.OTHER, "")


RECORDED = {
    "kernels": ["a-1", "b-2"],
    "starting": ["c-3"],
    "sessions": [{"path": "x.ipynb", "name": "x.ipynb", "type": "notebook", "kernel_id": "b-2"}],
}


@pytest.mark.parametrize("version", [{}, {"version": 1}])
def test_recorded_kernels_are_read_with_their_sessions(tmp_path, version):
    """A server that an earlier keeper started writes no version."""
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(version | RECORDED))
    session = Session("x.ipynb", "x.ipynb", "notebook")
    assert read_kernels(path) == (
        OwnKernel("a-1"),
        OwnKernel("b-2", (session,)),
        OwnKernel("c-3", starting=True),
    )


def test_the_number_of_recorded_kernels_is_limited(tmp_path):
    """The server's user can write the record, and each kernel is kept until it has ended."""
    path = tmp_path / "kernels.json"
    ids = [f"k-{number}" for number in range(20_000)]
    sessions = [RECORDED["sessions"][0] | {"kernel_id": "k-0"}] * 20_000
    for record in ({"kernels": ids, "starting": []}, {"kernels": [], "starting": ids}):
        path.write_text(json.dumps(record | {"sessions": sessions}))
        assert [kernel.id for kernel in read_kernels(path)] == ids[:500]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        '{"kernels": ["../../x"], "starting": [], "sessions": []}',
        '{"kernels": [1], "starting": [], "sessions": []}',
        '{"kernels": []}',
    ],
)
def test_an_invalid_record_has_no_kernels(tmp_path, text):
    path = tmp_path / "kernels.json"
    if text is not None:
        path.write_text(text)
    assert read_kernels(path) == ()


def test_a_record_of_a_newer_version_names_no_kernel_and_is_logged(tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(RECORDED | {"version": 2}))
    with structlog.testing.capture_logs() as log:
        assert read_kernels(path) == ()
    assert [(line["event"], line["version"]) for line in log] == [
        ("cannot read a record of kernels", 2)
    ]


class Answers(http.server.BaseHTTPRequestHandler):
    """A server whose responses the test chooses."""

    answers: dict

    def do_GET(self):
        status, body = self.answers.get(self.path.partition("?")[0], (404, ""))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_DELETE(self):
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def answering():
    handler = type("Handler", (Answers,), {"answers": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    client = JupyterClient(timeout=2.0)
    yield client, endpoint(server.server_port), handler.answers
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "body"), [(200, "no json"), (200, "[{}]"), (403, ""), (503, "")]
)
def test_invalid_kernel_lists_raise(answering, status, body):
    client, where, answers = answering
    answers["/api/kernels"] = (status, body)
    with pytest.raises(BackendUnavailable, match="cannot list the kernels"):
        client.kernels(where)


def test_kernels_are_read(answering):
    client, where, answers = answering
    answers["/api/kernels"] = (
        200,
        json.dumps([{"id": "k", "name": "python3", "execution_state": "busy", "more": 1}]),
    )
    assert [(k.id, k.execution_state) for k in client.kernels(where)] == [("k", "busy")]


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"launched_by": "fork", "exec_reason": None}, ("fork", None)),
        ({"launched_by": "exec", "exec_reason": "why"}, ("exec", "why")),
        ({"launched_by": "exec"}, ("exec", None)),
        ({}, (None, None)),
        ({"launched_by": None, "exec_reason": None}, (None, None)),
        ({"launched_by": "spawn", "exec_reason": "why"}, (None, None)),
        ({"launched_by": "fork", "exec_reason": "why"}, ("fork", None)),
        ({"launched_by": ["fork"], "exec_reason": {}}, (None, None)),
        ({"launched_by": "exec", "exec_reason": 7}, ("exec", None)),
        ({"launched_by": "exec", "exec_reason": "x" * 10_000}, ("exec", "x" * 300)),
    ],
    ids=str,
)
def test_how_a_kernel_was_launched_is_read_whatever_the_server_reports(
    answering, reported, expected
):
    """The server's user can write anything; kernels on a gateway have no such fields."""
    client, where, answers = answering
    answers["/api/kernels"] = (200, json.dumps([{"id": "k", "name": "python3", **reported}]))
    (kernel,) = client.kernels(where)
    assert (kernel.launched_by, kernel.exec_reason) == expected


def test_without_free_descriptors_it_is_unknown_whether_a_server_responds():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert JupyterClient().answers(endpoint(1)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_that_is_not_there_does_not_respond():
    client = JupyterClient(timeout=1.0)
    nowhere = endpoint(free_port())
    assert not client.answers(nowhere)
    assert not client.proves(nowhere)
    assert not client.shutdown(nowhere, timeout=1.0)
    with pytest.raises(BackendUnavailable):
        client.kernels(nowhere)


def test_a_silent_server_times_out():

    client = JupyterClient(timeout=0.1)
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(BackendTimeout):
        client.kernels(endpoint(deaf.getsockname()[1]))


STATUS = (
    '{"last_activity": "1970-01-01T00:01:40.500000Z", "started": "x",'
    ' "kernels": %d, "connections": 1}'
)


def test_activity_combines_status_kernels_and_terminals(answering):
    client, there, answers = answering
    answers["/api/status"] = (200, STATUS % 1)
    answers["/api/kernels"] = (
        200,
        json.dumps(
            [
                {
                    "id": "k",
                    "name": "n",
                    "execution_state": "busy",
                    "last_activity": "1970-01-01T00:00:02Z",
                    "connections": 3,
                },
                {"id": "l", "name": "n"},
            ]
        ),
    )
    answers["/api/terminals"] = (200, '[{"name": "1", "last_activity": "1970-01-01T00:00:03Z"}]')
    kernels = (KernelUse("k", "busy", 2.0, 3), KernelUse("l", "unknown", None))
    assert client.activity(there) == Activity(100.5, kernels, (TerminalUse("1", 3.0),))


def test_without_kernels_and_terminals_only_the_status_is_requested(answering):
    client, there, answers = answering
    answers["/api/status"] = (200, STATUS % 0)
    answers["/api/kernels"] = (500, "")
    assert client.activity(there) == Activity(100.5)


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ((503, ""), "its gateway is not reachable"),
        ((200, "{}"), "ValidationError"),
        ((404, ""), "answered 404"),
    ],
)
def test_unknown_activity_raises(answering, status, word):
    client, there, answers = answering
    answers["/api/status"] = status
    with pytest.raises(
        BackendUnavailable, match=rf"cannot ask the server on port \d+ how it is used: .*{word}"
    ):
        client.activity(there)


def test_ending_a_kernel_that_is_gone_succeeds(answering):
    client, there, answers = answering
    client.end_kernel(there, "gone")
    answers["/api/kernels/k"] = (500, "")
    with pytest.raises(BackendUnavailable, match=r"cannot end kernel k .*500"):
        client.end_kernel(there, "k")

"""Request validation: root directories, files, variables, Jupyter options, and bounds."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import replace

import pytest
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from jupyter_server_terminals.terminalmanager import TerminalManager
from jupyterlab.labapp import LabApp
from pydantic import BaseModel, ValidationError

from labkeeper.api.problems import invalid_request
from labkeeper.backends.local.paths import Paths
from labkeeper.core.access import ANYBODY, Caller, Scope, TokenLimits
from labkeeper.core.errors import InvalidSpec, NotAllowed
from labkeeper.core.spec import ServerName, ServerSpec
from labkeeper.schema import options, queries
from labkeeper.schema.options import JupyterOptions
from labkeeper.schema.requests import access, culling, gateway, limits, servers
from labkeeper.schema.requests.flat import FLAT
from labkeeper.schema.requests.gateway import GatewayFields
from labkeeper.schema.requests.limits import LimitFields
from labkeeper.schema.requests.servers import (
    BulkRequest,
    Defaults,
    RestartRequest,
    ServerRequest,
)

MANAGER = Caller("token:m", Scope.MANAGE)
GATEWAY = "http://g:1"
DEFAULTS = Defaults("127.0.0.1", 8888)


@pytest.fixture
def paths(tmp_path):
    return Paths(tmp_path)


def made(paths, caller=ANYBODY, *, defaults=DEFAULTS, **fields):
    return ServerRequest.model_validate(fields).spec(defaults, caller, paths.validate)


# Text


CONTROL_CHARACTERS = ["\t", "\n", "\r", "\x1b", "\x7f", "\x80", "\x9b", "\x9f"]
"""Characters that have an effect on terminals or on line-based readers."""


@pytest.mark.parametrize("letter", CONTROL_CHARACTERS)
@pytest.mark.parametrize(
    "fields",
    [
        {"root_dir": "<>"},
        {"labels": {"team": "<>"}},
        {"description": "<>"},
        {"gateway_url": GATEWAY, "gateway_auth_token": "<>"},
        {"gateway_url": GATEWAY, "gateway_auth_scheme": "<>"},
        {"gateway_url": GATEWAY, "gateway_headers": {"X": "<>"}},
        {"gateway_url": GATEWAY, "gateway_ca_certs": "<>"},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_single_line_fields_cannot_contain_control_characters(fields, letter):
    ServerRequest.model_validate_json(json.dumps(fields))
    with pytest.raises(ValidationError, match="must be one line, without control characters"):
        ServerRequest.model_validate_json(
            json.dumps(fields).replace("<>", json.dumps(letter)[1:-1])
        )


def test_a_spec_must_be_within_the_limits_of_the_token(paths):
    blue = Caller("token:b", Scope.MANAGE, TokenLimits(servers=("b-*",), labels={"team": "blue"}))
    assert made(paths, blue, name="b-1", labels={"team": "blue"}).name == "b-1"
    for fields in ({"name": "a", "labels": {"team": "blue"}}, {"name": "b-1"}):
        with pytest.raises(NotAllowed):
            made(paths, blue, **fields)
    with pytest.raises(NotAllowed):
        BulkRequest.model_validate({"names": ["b-1", "a"], "labels": {"team": "blue"}}).specs(
            DEFAULTS, blue, paths.validate
        )


# Variables

LOADING = [
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "LD_AUDIT",
    "DYLD_INSERT_LIBRARIES",
    "GCONV_PATH",
    "GLIBC_TUNABLES",
    "OPENSSL_CONF",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "PYTHONHOME",
    "IPYTHONDIR",
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_PATH",
    "JUPYTERLAB_DIR",
    "BASH_ENV",
    "ENV",
    "NODE_OPTIONS",
    "PERL5LIB",
    "RUBYOPT",
    "JAVA_TOOL_OPTIONS",
    "PATH",
    "HOME",
    "SHELL",
    "XDG_CONFIG_HOME",
    "GIT_SSH_COMMAND",
]


@pytest.mark.parametrize("field", ["env", "kernel_env"])
@pytest.mark.parametrize("name", LOADING)
def test_a_variable_that_loads_code_requires_admin(paths, field, name):
    asked = {field: {"HARMLESS": "1", name: "/tmp/x"}}
    with pytest.raises(NotAllowed) as caught:
        made(paths, MANAGER, **asked)
    assert caught.value.details == {"scope": "admin", "variable": name}
    assert f"cannot set the variable '{name}' in {field}" in caught.value.message
    assert "/tmp/x" not in caught.value.message
    assert getattr(made(paths, **asked), field)[name] == "/tmp/x"


def test_other_variables_may_be_set_by_every_caller(paths):
    names = [
        "TZ",
        "LANG",
        "DATABASE_URL",
        "GIT_AUTHOR_NAME",
        "KERNEL_USERNAME",
        "ENVIRONMENT",
        "HOMEPAGE",
        "MY_PATH",
        "no_proxy",
    ]
    for field in ("env", "kernel_env"):
        asked = dict.fromkeys(names, "x")
        assert getattr(made(paths, MANAGER, **{field: asked}), field) == asked


@pytest.mark.parametrize(
    "name", ["LABKEEPER_SERVER", "JUPYTER_RUNTIME_DIR", "JUPYTER_TOKEN", "JUPYTER_GATEWAY_URL"]
)
def test_variables_of_the_keeper_cannot_be_set_even_by_an_admin(name):
    with pytest.raises(ValidationError, match="belongs to labkeeper"):
        ServerRequest.model_validate({"env": {name: "x"}})


@pytest.mark.parametrize(
    "asked",
    [
        {"env": {"A": "é" * 32768, "B" * 128: "\U0001f600" * 32768}},
        {"env": {str("A" * n): "x" * 32768 for n in range(1, 9)}},
        {
            "env": {str("A" * n): "x" * 32768 for n in range(1, 5)},
            "kernel_env": {str("B" * n): "x" * 32768 for n in range(1, 5)},
        },
    ],
)
def test_variables_that_exceed_the_limits_of_exec_are_refused(asked):
    with pytest.raises(
        ValidationError, match="env and kernel_env: must be at most 262144 bytes together"
    ):
        ServerRequest.model_validate(asked)


def test_the_largest_accepted_environment_can_be_executed():
    """With one variable of the maximum length."""
    largest = {"ABCDEF": "\U0001f600" * 32766}
    assert len(f"ABCDEF={largest['ABCDEF']}\0".encode()) == 128 * 1024
    env = ServerRequest.model_validate(
        {"env": largest | {f"V{n}": "x" * 32000 for n in range(4)}}
    ).env
    pid = os.posix_spawn("/bin/true", ["true"], env)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# Jupyter options


def test_gateway_headers_have_a_total_limit():
    given = {
        "gateway_url": "http://gateway",
        "gateway_headers": {f"X-{number}": "x" * 8000 for number in range(2)},
    }
    assert ServerRequest.model_validate(given).gateway.headers == given["gateway_headers"]
    given["gateway_headers"]["X-2"] = "x" * 8000
    with pytest.raises(ValidationError, match="at most 16384 characters together"):
        ServerRequest.model_validate(given)


def test_options_are_part_of_the_spec(paths):
    asked = {
        "ServerApp.terminals_enabled": False,
        "ZMQChannelsWebsocketConnection.iopub_data_rate_limit": 1e8,
    }
    spec = made(paths, MANAGER, **{"jupyter-options": asked})
    assert spec.jupyter_options == asked
    assert made(paths).jupyter_options == {}
    assert spec.differs(made(paths)) == ("jupyter_options",)


@pytest.mark.parametrize(
    "asked",
    [
        {"c.ServerApp.terminals_enabled": True},
        {"--ServerApp.terminals_enabled": True},
        {"ServerApp.terminals_enabled\n": True},
        {"ServerApp": {"terminals_enabled": True}},
        {"terminals_enabled": True},
        {"ServerApp.token": ""},
        {"ServerApp.root_dir": "/"},
        {"ServerApp.allow_origin": "*"},
        {"ServerApp.disable_check_xsrf": True},
        {"ServerApp.jpserver_extensions": {"evil": True}},
        {"FileContentsManager.post_save_hook": "evil.hook"},
        {"ServerApp.terminals_enabled.x": True},
        {"": True},
        {f"ServerApp.x{n}": True for n in range(10_000)},
    ],
)
def test_an_unknown_option_is_refused_and_the_known_ones_are_listed(asked):
    with pytest.raises(
        ValidationError, match=r"only these can be set: ContentsManager\.allow_hidden, .*limit_rate"
    ) as caught:
        ServerRequest.model_validate({"jupyter_options": asked})
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ServerApp.terminals_enabled", "false"),
        ("ServerApp.terminals_enabled", 1),
        ("ServerApp.terminals_enabled", {"x": True}),
        ("ServerApp.terminals_enabled", None),
        ("ServerApp.terminals_enabled", "True\nc.ServerApp.token = ''"),
        ("ServerApp.max_body_size", 10**30),
        ("ServerApp.max_body_size", -1),
        ("MappingKernelManager.cull_idle_timeout", 1.5),
        ("MappingKernelManager.cull_idle_timeout", True),
        ("ZMQChannelsWebsocketConnection.iopub_msg_rate_limit", float("inf")),
        ("ZMQChannelsWebsocketConnection.iopub_msg_rate_limit", "1; import os"),
        ("ZMQChannelsWebsocketConnection.iopub_msg_rate_limit", [1]),
    ],
)
def test_an_option_is_a_boolean_or_a_number_within_its_bounds(name, value):
    with pytest.raises(ValidationError, match=name.replace(".", r"\.")):
        ServerRequest.model_validate({"jupyter_options": {name: value}})


def test_no_option_accepts_text():
    kinds = {field["type"] for field in JupyterOptions.model_json_schema()["properties"].values()}
    assert kinds == {"boolean", "integer", "number"}


def test_every_option_is_a_trait_of_jupyter_with_the_same_type():
    """Checked against the installed Jupyter."""
    ends = (
        AsyncLargeFileManager,
        ZMQChannelsWebsocketConnection,
        AsyncMappingKernelManager,
        TerminalManager,
        LabApp,
    )
    classes = {cls.__name__: cls for end in (*ends, LabApp.serverapp_class) for cls in end.__mro__}
    kinds = {"boolean": "Bool", "integer": "Int", "number": "Float"}
    for name, field in JupyterOptions.model_json_schema()["properties"].items():
        section, trait = name.split(".")
        found = classes[section].class_traits(config=True)[trait]
        assert type(found).__name__ == kinds[field["type"]], name


# How kernels are launched

EXECUTING = replace(DEFAULTS, kernels_by="exec")
"""The defaults of a keeper that forks no kernels."""


@pytest.mark.parametrize("missing", [{}, {"kernels_by": None}], ids=["absent", "null"])
def test_kernels_are_launched_as_the_keeper_is_set_unless_requested(paths, missing):
    assert made(paths, **missing).kernels_by == "fork"
    assert made(paths, **missing, defaults=EXECUTING).kernels_by == "exec"
    executed = made(paths, MANAGER, **{"kernels-by": "exec"})
    assert executed.kernels_by == "exec"
    assert executed.differs(made(paths)) == ("kernels_by",)
    assert executed == made(paths, defaults=EXECUTING)


@pytest.mark.parametrize("method", ["spawn", "", "FORK", True, ["fork"]])
def test_kernels_are_forked_or_executed(method):
    with pytest.raises(ValidationError, match="kernels_by"):
        ServerRequest.model_validate({"kernels_by": method})


def test_a_keeper_that_executes_kernels_refuses_to_fork_them(paths):
    """Even for an admin; a server that was to fork them can still be restarted."""
    because = r"kernels_by must be exec: .*\(LABKEEPER_KERNELS_BY=exec\)"
    with pytest.raises(InvalidSpec, match=because) as caught:
        made(paths, kernels_by="fork", defaults=EXECUTING)
    assert [one["field"] for one in caught.value.details["errors"]] == ["kernels_by"]
    bulk = BulkRequest.model_validate({"names": ["a", "b"], "kernels_by": "fork"})
    with pytest.raises(InvalidSpec, match=because):
        bulk.specs(EXECUTING, ANYBODY, paths.validate)
    old = made(paths)
    with pytest.raises(InvalidSpec, match=because):
        revised(paths, old, kernels_by="fork", defaults=EXECUTING)
    assert revised(paths, old, labels={"a": "b"}, defaults=EXECUTING) == replace(
        old, labels={"a": "b"}
    )


def test_a_restart_keeps_how_kernels_are_launched_unless_it_names_it(paths):
    old = made(paths, kernels_by="exec")
    assert revised(paths, old, labels={"a": "b"}).kernels_by == "exec"
    assert revised(paths, old, kernels_by="fork") == replace(old, kernels_by="fork")
    assert revised(paths, old, kernels_by=None) == replace(old, kernels_by="fork")


# Restarts


def revised(paths, old, caller=ANYBODY, *, defaults=DEFAULTS, **fields):
    request = RestartRequest.model_validate(fields)
    return request.revise(old, defaults, caller, paths.validate)


def test_a_restart_is_validated_like_a_start(paths):
    old = made(paths)
    with pytest.raises(InvalidSpec, match="root_dir must be within"):
        revised(paths, old, root_dir="/etc")
    with pytest.raises(NotAllowed, match="LD_PRELOAD"):
        revised(paths, old, MANAGER, env={"LD_PRELOAD": "x"})
    with pytest.raises(NotAllowed, match="gateway_ca_certs"):
        revised(paths, old, MANAGER, gateway_url=GATEWAY, gateway_ca_certs="/etc/passwd")
    new = revised(
        paths, old, MANAGER, jupyter_options={"ServerApp.quit_button": False}, env={"A": "b"}
    )
    assert new == replace(old, jupyter_options={"ServerApp.quit_button": False}, env={"A": "b"})


def test_settings_of_an_admin_survive_a_restart_by_another_caller(paths):
    old = made(paths, env={"LD_PRELOAD": "x"})
    assert revised(paths, old, MANAGER, labels={"a": "b"}) == replace(old, labels={"a": "b"})


def test_a_restart_keeps_the_root_directory_or_is_refused(tmp_path):
    """It does not return to the default one. Another user may not use the directory."""
    for name in ("alice", "bob"):
        (tmp_path / name / "deep").mkdir(parents=True)
    paths = Paths(tmp_path / "%u")
    old = made(paths, user="alice", root_dir="deep")
    assert revised(paths, old, labels={"a": "b"}).root_dir == str(tmp_path / "alice" / "deep")
    with pytest.raises(InvalidSpec, match=f"must be within {tmp_path / 'bob'} "):
        revised(paths, old, user="bob")
    assert revised(paths, old, user="bob", root_dir="deep").root_dir == str(
        tmp_path / "bob" / "deep"
    )
    with pytest.raises(NotAllowed, match="run a server as user 'alice'"):
        revised(paths, old, MANAGER, labels={"a": "b"})


def test_a_restart_cannot_move_a_server_out_of_the_tokens_limits(paths):
    blue = Caller("token:b", Scope.MANAGE, TokenLimits(labels={"team": "blue"}))
    old = made(paths, blue, labels={"team": "blue"})
    assert revised(paths, old, blue, env={"A": "b"}).labels == {"team": "blue"}
    with pytest.raises(NotAllowed):
        revised(paths, old, blue, labels={})
    other = ServerSpec(ServerName("x"), old.root_dir)
    assert revised(paths, other, blue) is None


# Bounds

MODELS = [
    model
    for module in (access, culling, gateway, limits, servers, queries, options)
    for _, model in inspect.getmembers(module, inspect.isclass)
    if issubclass(model, BaseModel) and model.__module__ == module.__name__ and model.model_fields
]


def unbounded(schema, path=""):
    """Yield every string, array and object of a schema without a size limit."""
    kind = schema.get("type")
    if kind == "string" and not {"enum", "const", "maxLength"} & schema.keys():
        yield path
    if kind == "array" and "maxItems" not in schema:
        yield path
    if kind == "object" and schema.get("additionalProperties", True) is not False:
        if "maxProperties" not in schema:
            yield path
        if "maxLength" not in schema.get("propertyNames", {}):
            yield f"{path} (names)"
    for key in ("properties", "$defs"):
        for name, below in schema.get(key, {}).items():
            yield from unbounded(below, f"{path}.{name}")
    for below in (
        schema.get("items"),
        schema.get("additionalProperties"),
        *schema.get("anyOf", ()),
    ):
        if isinstance(below, dict):
            yield from unbounded(below, path)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_text_list_and_mapping_of_a_request_has_a_bound(model):
    assert list(unbounded(model.model_json_schema(mode="validation"))) == []


def test_unbounded_finds_missing_bounds():
    class Loose(BaseModel, extra="forbid"):
        text: str
        texts: list[str]
        mapping: dict[str, int]

    assert sorted(unbounded(Loose.model_json_schema())) == [
        ".mapping",
        ".mapping (names)",
        ".text",
        ".texts",
        ".texts",
    ]


def test_an_overlong_duration_is_refused():
    with pytest.raises(ValidationError, match="must be seconds as a number"):
        ServerRequest.model_validate({"idle_timeout": "9" * 1_000_000})


# Nested fields and their flat names

FLAT_AND_NESTED = {
    "gateway": (
        {
            "gateway-url": GATEWAY,
            "gateway_auth_token": "t",
            "gateway-headers": {"X": "y"},
            "require-gateway": False,
        },
        {"gateway": {"url": GATEWAY, "auth-token": "t", "headers": {"X": "y"}, "required": False}},
    ),
    "limits": (
        {"memory_limit": 2**30, "cpu-limit": 1.5, "process_limit": 64},
        {"limits": {"memory": 2**30, "cpus": 1.5, "processes": 64}},
    ),
    "both ways": (
        {"gateway": {"url": GATEWAY}, "gateway_auth_token": "t"},
        {"gateway": {"url": GATEWAY, "auth_token": "t"}},
    ),
}


@pytest.mark.parametrize(("flat", "nested"), FLAT_AND_NESTED.values(), ids=FLAT_AND_NESTED)
def test_flat_names_are_equivalent_to_nested_fields(paths, flat, nested):
    sent = json.dumps(flat)
    assert made(paths, **flat) == made(paths, **nested)
    assert json.dumps(flat) == sent
    spec = made(paths, gateway={"url": "http://other:1"}, limits={"memory": 2**28})
    assert revised(paths, spec, ANYBODY, **flat) == revised(paths, spec, ANYBODY, **nested)


def test_every_nested_field_has_a_flat_name():
    nested = {("gateway", name) for name in GatewayFields.model_fields} | {
        ("limits", name) for name in LimitFields.model_fields
    }
    assert {*FLAT.values()} == nested


@pytest.mark.parametrize(
    ("fields", "mistakes"),
    [
        ({"gateway_url": 1}, ["gateway_url"]),
        ({"gateway-url": "x", "memory-limit": 1}, ["gateway_url", "memory_limit"]),
        ({"gateway": {"url": "x"}, "limits": {"memory": 1}}, ["limits.memory", "gateway.url"]),
        ({"gateway": {"url": GATEWAY, "headers": {"X": 1}}}, ["gateway.headers.X"]),
        ({"gateway_url": GATEWAY, "gateway_headers": {"X": 1}}, ["gateway_headers.X"]),
        ({"gateway": {"colour": 1}}, ["gateway.colour"]),
        ({"gateway": None, "limits": 1}, ["limits", "gateway"]),
    ],
)
def test_errors_name_fields_as_they_were_sent(fields, mistakes):
    with pytest.raises(ValidationError) as caught:
        ServerRequest.model_validate(fields)
    found = [mistake["field"] for mistake in invalid_request(caught.value).details["errors"]]
    assert sorted(found) == sorted(mistakes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"gateway_url": GATEWAY, "gateway": {"url": GATEWAY}},
            "gateway_url: is gateway.url by another name; give it once",
        ),
        (
            {"gateway_url": GATEWAY, "gateway-url": GATEWAY},
            "gateway_url: is gateway.url by another name; give it once",
        ),
        (
            {"gateway_url": GATEWAY, "gateway": 1},
            "gateway_url: is gateway.url by another name; give it once",
        ),
        ({"gateway_auth_token": "t"}, "gateway_auth_token: only together with gateway_url"),
        ({"gateway": {"auth_token": "t"}}, "gateway.auth_token: only together with gateway.url"),
        ({"gateway": {}}, "gateway: only together with gateway.url"),
        (
            {"gateway": {"url": GATEWAY, "client_key": "k"}},
            "gateway.client_key: only together with gateway.client_cert",
        ),
        (
            {"gateway_url": GATEWAY, "gateway_client_key": "k"},
            "gateway_client_key: only together with gateway_client_cert",
        ),
    ],
)
def test_contradictory_fields_are_named_as_they_were_sent(fields, message):
    with pytest.raises(ValidationError) as caught:
        ServerRequest.model_validate(fields)
    assert invalid_request(caught.value).message == f"cannot accept the request: body: {message}"

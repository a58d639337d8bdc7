"""The client against the real application, without sockets: methods, errors, requests, answers."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from fake_keeper import TOKEN, FixedProbe, a_server, fake_keeper
from harness import until
from labkeeper.api import problems
from labkeeper.api.app import create_app
from labkeeper.api.routes import ROUTES
from labkeeper.client import Client
from labkeeper.core import errors
from labkeeper.core.access import Scope
from labkeeper.core.culling import CullState, Rule
from labkeeper.core.errors import (
    BadAnswer,
    Conflict,
    InvalidSpec,
    LabkeeperError,
    NotAuthenticated,
    RequestError,
    ServerNotFound,
    SettingsError,
    StartFailed,
    Unreachable,
)
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.messages import HistoryKind
from labkeeper.core.ports import Library
from labkeeper.core.server import FailureClass, Kernel, StopMethod
from labkeeper.identity.sessions import Sessions
from labkeeper.runtime import Keeper
from labkeeper.schema.answers.base import TOLERANT, Answer
from labkeeper.schema.requests.gateway import GatewayFields
from labkeeper.schema.requests.servers import ServerRequest
from labkeeper.testing.world import World

URL = "http://keeper"


@dataclass
class Running:
    """A keeper over a world that the test controls, its application, and a client of it."""

    world: World
    probe: FixedProbe
    keeper: Keeper
    app: object
    client: Client
    sessions: Sessions


@contextmanager
def running_keeper(notebook_dir: Path):
    with fake_keeper(notebook_dir) as made:
        app = create_app(made.services)
        with Client(URL, token=TOKEN, transport=httpx.WSGITransport(app=app)) as client:
            sessions = made.services.sessions
            yield Running(made.world, made.probe, made.keeper, app, client, sessions)


@pytest.fixture
def running(tmp_path):
    with running_keeper(tmp_path) as made:
        yield made


@pytest.fixture
def client(running):
    return running.client


class RecordingTransport(httpx.BaseTransport):
    """Records requests, and responds as it is told."""

    def __init__(self, answer):
        self.requests = []
        self._answer = answer

    def handle_request(self, request):
        request.read()
        self.requests.append(request)
        return self._answer(request) if callable(self._answer) else self._answer


def as_json(server):
    return json.loads(server.model_dump_json())


def answering(answer):
    return Client(URL, transport=RecordingTransport(answer))


# Lifecycle of a server


def test_methods_cover_the_life_of_a_server(client, tmp_path):
    made = client.create(name="demo", root_dir=tmp_path, labels={"team": "blue"})
    assert (made.state, made.goal, made.name, made.labels) == (
        State.RUNNING,
        Goal.UP,
        "demo",
        {"team": "blue"},
    )
    assert made.lab_url.endswith(f"/lab?token={made.token}")
    assert (
        client.create(name="demo", root_dir=tmp_path, labels={"team": "blue"}).generation
        == made.generation
    )
    stopped = client.stop("demo")
    assert (stopped.state, stopped.stop_report.method) == (State.STOPPED, "shutdown")
    assert client.start("demo").generation > made.generation
    assert client.restart("demo").state is State.RUNNING
    assert client.stop("demo", force=True).stop_report.method == "sigkill"
    assert client.delete("demo").goal is Goal.ABSENT
    with pytest.raises(ServerNotFound):
        client.get("demo")


def test_a_spec_may_be_a_mapping_with_names_of_the_api(client):
    """Kebab-case names are accepted; keyword arguments take precedence."""
    server = client.create({"name": "other", "gateway-url": "http://gateway:8888"}, name="demo")
    assert (server.name, server.gateway.url) == ("demo", "http://gateway:8888")


def test_a_spec_may_be_a_request_model(client):
    """Only fields that were set are sent; keyword arguments take precedence."""
    request = ServerRequest(
        name="demo",
        gateway=GatewayFields(url="http://gateway:8888"),
        idle_timeout="2h",
        jupyter_options={"ServerApp.terminals_enabled": False},
    )
    server = client.create(request, labels={"a": "b"})
    assert (server.name, server.gateway.url, server.idle_timeout, server.labels) == (
        "demo",
        "http://gateway:8888",
        7200.0,
        {"a": "b"},
    )
    assert server.jupyter_options == {"ServerApp.terminals_enabled": False}


def test_keyword_arguments_also_override_nested_gateway_fields(client):
    server = client.create(
        {"gateway": {"url": "http://one:1", "required": False}}, gateway_url="http://two:2"
    )
    assert (server.gateway.url, server.gateway.required) == ("http://two:2", False)
    with pytest.raises(InvalidSpec, match=r"gateway_url: is gateway\.url by another name"):
        client.create(
            {"gateway": {"url": "http://one:1"}, "gateway-url": "http://one:1"}, labels={}
        )


def test_without_waiting_the_server_is_still_starting(running):
    """`wait=0` returns immediately, and `wait_for` waits later."""
    running.world.temper("default").boots = False
    assert running.client.create(wait=0).state is State.STARTING
    assert running.client.get("default", wait_for=State.RUNNING, wait=0).state is State.STARTING
    until(lambda: running.world.living("default"), what="the server's process to be launched")
    running.world.answer("default")
    assert running.client.get("default", wait_for="running").state is State.RUNNING


def test_lists_cover_all_pages(running, client, tmp_path):
    """Pages are requested as they are needed."""
    for name in ("a", "b", "c"):
        client.create(name=name, labels={"odd": str(name != "b")})
    real, asked = httpx.WSGITransport(app=running.app), []

    def one_by_one(request):
        asked.append(request)
        return real.handle_request(
            httpx.Request(
                "GET", request.url.copy_merge_params({"limit": 1}), headers=request.headers
            )
        )

    with Client(URL, token=TOKEN, transport=RecordingTransport(one_by_one)) as small:
        assert [server.name for server in small.list()] == ["a", "b", "c"]
    assert len(asked) == 3
    paged = RecordingTransport(real.handle_request)
    with Client(URL, token=TOKEN, transport=paged) as paging:
        assert [server.name for server in paging.list(page_size=2)] == ["a", "b", "c"]
    assert [request.url.params["limit"] for request in paged.requests] == ["2", "2"]
    assert [server.name for server in client.list(label=["odd=True"])] == ["a", "c"]
    client.stop("a")
    assert [server.name for server in client.list(state=["stopped", State.FAILED])] == ["a"]


def test_lists_can_be_filtered_by_owner(client):
    client.create()
    client.create_token("ci", "read")
    for owner, names in (("local", ["default"]), ("ada", [])):
        assert [server.name for server in client.list(owner=owner)] == names
        assert {event.owner for event in client.events(owner=owner)} == (
            {owner} if names else set()
        )
        assert [token.name for token in client.tokens(owner=owner)] == (["ci"] if names else [])


def test_logs_are_text_and_can_be_followed_to_the_end(running, client):
    """`follow` yields lines without line feeds, and splits at line feeds alone."""
    client.create()
    running.world.write("default", "50 %\r100 %\fdone")
    assert client.logs("default", tail=1) == "50 %\r100 %\fdone\n"
    assert client.logs("default").count("\n") == 2
    lines = client.follow("default", tail=1)
    assert next(lines) == "50 %\r100 %\fdone"
    client.stop("default")
    assert [line for line in lines if "ended" in line]
    assert next(client.follow("default")).startswith("launch")


def test_follow_reassembles_lines_from_chunks():
    """The last line may lack a line feed."""
    with answering(
        httpx.Response(200, content=iter([b"on", b"e\ntwo\n", b"", b"thr", b"ee"]))
    ) as client:
        assert list(client.follow("x")) == ["one", "two", "three"]


def test_closing_a_follower_closes_the_response(client):
    client.create()
    lines = client.follow("default")
    next(lines)
    lines.close()
    assert list(lines) == []


def test_kernels_are_models(running, client):
    executed = {"launched_by": "exec", "exec_reason": "why"}
    running.probe.kernels_there = (
        Kernel("1", "python3", "idle", "2026-01-01T00:00:00Z"),
        Kernel("2", "python3", "busy", **executed),
    )
    client.create(kernels_by="exec")
    kernels = client.kernels("default")
    assert [(kernel.id, kernel.execution_state) for kernel in kernels] == [
        ("1", "idle"),
        ("2", "busy"),
    ]
    assert [(kernel.launched_by, kernel.exec_reason) for kernel in kernels] == [
        (None, None),
        ("exec", "why"),
    ]
    assert client.get("default").kernels_by == "exec"
    client.stop("default")
    with pytest.raises(Conflict):
        client.kernels("default")


def test_libraries_are_models(running, client):
    assert client.libraries() == []
    running.world.libraries = (Library("polars", loaded=False, reason="why"),)
    (library,) = client.libraries()
    assert (library.name, library.loaded, library.reason) == ("polars", False, "why")


def test_version_health_and_readiness(running, client):
    """A keeper that has stopped is neither ready nor healthy."""
    assert (client.version(), client.healthy(), client.ready()) == ("1.2.3", True, True)
    running.keeper.close()
    assert (client.healthy(), client.ready()) == (False, False)


@pytest.mark.parametrize(
    ("since", "sent"),
    [
        (None, None),
        (90, "90"),
        ("7d", "7d"),
        (datetime(2026, 12, 1, 8, tzinfo=UTC), "2026-12-01T08:00:00+00:00"),
    ],
)
def test_usage_over_time_is_asked_for_since_a_time_or_a_duration(running, since, sent):
    recorder = RecordingTransport(httpx.WSGITransport(app=running.app).handle_request)
    with Client(URL, token=TOKEN, transport=recorder) as client:
        client.create()
        found = client.usage("default", since=since)
    assert recorder.requests[-1].url.params.get("since") == sent
    assert (found.memory, found.until[:2]) == ([], "20")


def test_a_time_of_the_local_clock_is_sent_with_its_offset(running):
    recorder = RecordingTransport(httpx.WSGITransport(app=running.app).handle_request)
    with Client(URL, token=TOKEN, transport=recorder) as client:
        client.create()
        client.usage("default", since=datetime(2026, 12, 1, 8))  # noqa: DTZ001 - it is the point
    sent = datetime.fromisoformat(recorder.requests[-1].url.params["since"])
    assert sent.timestamp() == datetime(2026, 12, 1, 8).timestamp()  # noqa: DTZ001


def test_every_route_has_a_method(running):
    recorder = RecordingTransport(httpx.WSGITransport(app=running.app).handle_request)
    with Client(URL, token=TOKEN, transport=recorder) as client:
        client.create()
        client.snooze("default", "1h")
        for use in (
            client.get,
            client.kernels,
            client.logs,
            client.restart,
            client.stop,
            client.start,
            client.idle,
            client.usage,
            client.events,
            client.rotate_token,
            client.link,
        ):
            use("default")
        client.create_token("ci", "read")
        client.tokens()
        client.sessions()
        session, _ = running.sessions.make("default", "token:ci")
        client.revoke_session(session.id)
        with pytest.raises(Conflict, match="own host name"):
            client.session_link()
        client.me()
        client.revoke_token("ci")
        client.start_many(["default"])
        client.delete("default")
        for use in (
            client.version,
            client.ready,
            client.healthy,
            client.orphaned_kernels,
            client.events,
            client.webhooks,
            client.metrics,
            client.idle_all,
        ):
            use()
        assert list(client.list()) == []
    urls = running.app.url_map.bind("keeper")
    reached = {urls.match(request.url.path, request.method)[0] for request in recorder.requests}
    # A one-time link is opened by browsers.
    assert reached == {route.handler.__name__ for route in ROUTES} - {"follow_link", "open_link"}


# Errors


@pytest.mark.parametrize("cls", problems.STATUS, ids=lambda cls: cls.__name__)
def test_errors_are_raised_as_they_were_in_the_handler(running, cls):
    """With class, message and details."""
    details = {
        "name": "demo",
        "errors": [{"field": "a", "rule": "b"}],
        "exit": {"code": 1, "signal": None},
        "log_tail": ["last"],
    }

    def fail(*_):
        raise cls("cannot do it: zażółć", **details)

    running.keeper.get = fail
    with pytest.raises(cls) as caught:
        running.client.logs("demo")
    assert type(caught.value) is cls
    assert (caught.value.message, caught.value.details) == ("cannot do it: zażółć", details)
    with pytest.raises(cls) as caught:
        list(running.client.follow("demo"))
    assert type(caught.value) is cls


def test_every_error_has_a_status_or_stays_on_its_side():
    """A new class needs a status, unless no response carries it."""
    at_home = {LabkeeperError, errors.ClientError, Unreachable, BadAnswer, SettingsError}
    ours = {cls for cls in errors.tree().values() if cls.__module__ == errors.__name__}
    assert ours - at_home == set(problems.STATUS)


def test_a_failed_start_has_its_failure_class_and_log_tail(running):
    running.world.temper("default").refusal = errors.BackendRefused(
        "cannot: port taken", failure_class="port-in-use", log_tail=["bind"]
    )
    with pytest.raises(StartFailed, match="port taken") as caught:
        running.client.create()
    assert (caught.value.details["failure_class"], caught.value.details["log_tail"]) == (
        "port-in-use",
        ["bind"],
    )


def test_unknown_fields_are_named(client):
    with pytest.raises(InvalidSpec) as caught:
        client.create({"colour": "blue"})
    assert caught.value.details["errors"] == [{"field": "colour", "rule": "is not a known field"}]


def test_a_wrong_token_raises_not_authenticated(running):
    for token in (None, "wrong"):
        with (
            Client(URL, token=token, transport=httpx.WSGITransport(app=running.app)) as client,
            pytest.raises(NotAuthenticated, match="labkeeper token"),
        ):
            next(client.list())


@pytest.mark.parametrize(
    ("status", "code", "cls"),
    [
        (418, "im_a_teapot", RequestError),
        (500, "internal_error", LabkeeperError),
        (400, "unreachable", RequestError),
    ],
)
def test_an_unknown_code_raises_the_nearest_base_class(status, code, cls):
    """Also a code that responses never carry; all of the problem's fields become details."""
    body = {
        "status": status,
        "detail": "no",
        "code": code,
        "request_id": "r1",
        "message": "more",
        "self": 1,
    }
    with (
        answering(httpx.Response(status, json=body)) as client,
        pytest.raises(LabkeeperError, match=r"^no$") as caught,
    ):
        client.get("x")
    assert type(caught.value) is cls
    assert caught.value.details == {
        "message": "more",
        "self": 1,
        "code": code,
        "status": status,
        "request_id": "r1",
    }


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>Sign in</html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"name": "x"}),
        httpx.Response(200, content=b"\xff\xfe"),
        httpx.Response(200, content=b"[" * 100_000),
        httpx.Response(302, headers={"Location": "http://elsewhere"}),
        httpx.Response(404, text="not here"),
        httpx.Response(502, json={"detail": ["no", "text"], "code": 5}),
        httpx.Response(500, json="text"),
    ],
)
def test_a_response_that_no_keeper_sends_raises_bad_answer(answer):
    """HTML of a proxy, redirects, other JSON: the message has URL and status."""
    with (
        answering(answer) as client,
        pytest.raises(BadAnswer, match=r"http://keeper/api/servers/x.*is it a keeper"),
    ):
        client.get("x")


@pytest.mark.parametrize(
    "body", [{"name": "jupyter", "version": "1"}, {"version": "1"}, {"name": "labkeeper"}]
)
def test_another_service_with_a_version_is_not_a_keeper(body):
    with answering(httpx.Response(200, json=body)) as client, pytest.raises(BadAnswer):
        client.version()


def foreign_errors():
    """Return an instance of every exception class of httpx."""
    request = httpx.Request("GET", URL)
    made, waiting = {}, [httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, httpx.CookieConflict]
    while waiting:
        cls = waiting.pop()
        waiting.extend(cls.__subclasses__())
        if cls is httpx.HTTPStatusError:
            made[cls] = cls("x", request=request, response=httpx.Response(500, request=request))
        elif cls in {
            httpx.StreamConsumed,
            httpx.StreamClosed,
            httpx.ResponseNotRead,
            httpx.RequestNotRead,
        }:
            made[cls] = cls()
        else:
            made[cls] = cls("it broke")
    return made


@pytest.mark.parametrize("error", foreign_errors().values(), ids=lambda error: type(error).__name__)
def test_no_exception_of_httpx_escapes(error):
    """Before or during a response, they become the cause of Unreachable or BadAnswer."""

    def fail(_request):
        raise error

    def fail_later(_request):
        def pieces():
            yield b"one\n"
            raise error

        return httpx.Response(200, content=pieces())

    for answer in (fail, fail_later):
        with answering(answer) as client:
            for use in (
                client.get,
                client.logs,
                lambda name, client=client: list(client.follow(name)),
            ):
                with pytest.raises(
                    (Unreachable, BadAnswer), match=r"(at|of) http://keeper"
                ) as caught:
                    use("x")
                assert caught.value.__cause__ is error


def test_a_refused_connection_says_how_to_start_a_keeper():
    with Client("http://127.0.0.1:1") as client, pytest.raises(Unreachable) as caught:
        client.version()
    assert "cannot reach a keeper at http://127.0.0.1:1:" in caught.value.message
    assert "`labkeeper serve`" in caught.value.message


def test_other_exceptions_pass_through():
    """Ctrl-C during a request, for example."""

    def interrupt(_request):
        raise KeyboardInterrupt

    with answering(interrupt) as client, pytest.raises(KeyboardInterrupt):
        client.version()


# Requests


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "x?y", "x" * 64, "\udcff", "a\n"])
def test_an_invalid_name_is_not_found_without_a_request(name):
    """It cannot become a different path."""
    recorder = RecordingTransport(httpx.Response(200, json=as_json(a_server())))
    with Client(URL, transport=recorder) as client:
        for use in (client.get, client.stop, client.delete, client.logs, client.kernels):
            with pytest.raises(ServerNotFound, match="must be 1 to 63"):
                use(name)
    assert recorder.requests == []


LOOP = {}
LOOP["again"] = LOOP


@pytest.mark.parametrize(
    "fields", [{"env": {"A": object()}}, {"port": float("nan")}, {"env": LOOP}]
)
def test_fields_that_are_not_json_are_refused_before_a_request(fields):
    recorder = RecordingTransport(httpx.Response(200, json=as_json(a_server())))
    with (
        Client(URL, transport=recorder) as client,
        pytest.raises(InvalidSpec, match="cannot send the request"),
    ):
        client.create(fields)
    assert recorder.requests == []


def test_text_with_surrogates_is_refused_before_a_request():
    """The command line may contain surrogates, which a query cannot."""
    with answering(httpx.Response(200, json={"servers": []})) as client, pytest.raises(InvalidSpec):
        next(client.list(label=["\udcff"]))


def test_paths_are_sent_as_text():
    recorder = RecordingTransport(httpx.Response(201, json=as_json(a_server())))
    with Client(URL, transport=recorder) as client:
        client.create(root_dir=Path("/data"), name="x")
    assert json.loads(recorder.requests[0].content) == {"root_dir": "/data", "name": "x"}


@pytest.mark.parametrize(
    ("use", "longest"),
    [
        (lambda c: c.create(wait=100), 105),
        (lambda c: c.create(), None),
        (lambda c: c.start("x", wait=0), 5),
        (lambda c: c.stop("x", wait=1e300), 3605),
        (lambda c: c.stop("x", wait=float("nan")), 5),
        (lambda c: c.delete("x", wait=-7), 5),
        (lambda c: c.get("x"), 5),
        (lambda c: c.get("x", wait_for="running"), None),
        (lambda c: c.get("x", wait_for="running", wait=30), 35),
        (lambda c: c.logs("x"), 5),
        (lambda c: list(c.follow("x")), None),
    ],
)
def test_the_read_timeout_exceeds_the_keepers_wait(use, longest):
    """By a margin; there is none if the keeper chooses the wait."""
    recorder = RecordingTransport(httpx.Response(200, json=as_json(a_server())))
    with Client(URL, transport=recorder, timeout=5) as client:
        use(client)
    assert recorder.requests[0].extensions["timeout"] == {
        "connect": 5,
        "read": longest,
        "write": 5,
        "pool": 5,
    }


def test_a_base_url_may_have_a_path():
    """As behind a reverse proxy."""
    recorder = RecordingTransport(httpx.Response(200, json=as_json(a_server())))
    with Client("https://host/keeper/", token="t", transport=recorder) as client:
        client.get("x")
    assert str(recorder.requests[0].url) == "https://host/keeper/api/servers/x"
    assert recorder.requests[0].headers["Authorization"] == "Bearer t"


@pytest.mark.parametrize(
    "url",
    [
        *("", "host:80", "ftp://host", "http://", "http://host:0", "http://host:99999"),
        *("http://u:p@host", "http://h/?q=1", "http://h/#f", "http://[::1", "http://h\x00st"),
    ],
)
def test_an_invalid_url_is_refused_by_the_constructor(url):
    with pytest.raises(SettingsError, match="cannot use"):
        Client(url)


@pytest.mark.parametrize("token", ["", "with space", "new\nline", "zażółć"])
def test_an_invalid_token_is_refused_and_not_shown(token):
    """It could not be sent in a header."""
    with pytest.raises(SettingsError) as caught:
        Client(URL, token=token)
    assert not token or token not in caught.value.message


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://127.0.0.1:1"])
def test_proxies_of_the_environment_are_ignored(url, monkeypatch):
    """They would receive the token."""
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:3128")
    with Client(url, token=TOKEN) as client, pytest.raises(Unreachable, match=r"127\.0\.0\.1:1"):
        client.version()


# Responses


def test_responses_of_a_newer_keeper_are_accepted():
    """New fields are kept, and new states are strings."""
    with answering(
        httpx.Response(200, json=as_json(a_server()) | {"state": "paused", "colour": "blue"})
    ) as client:
        server = client.get("x")
    assert (server.state, server.colour, server.model_dump(mode="json")["colour"]) == (
        "paused",
        "blue",
        "blue",
    )


def test_a_dumped_server_equals_the_response_of_the_api(running, client):
    client.create(labels={"a": "b"})
    client.stop("default")
    api = (
        running.app.test_client()
        .get("/api/servers/default", headers={"Authorization": f"Bearer {TOKEN}"})
        .get_json()
    )
    ours = client.get("default").model_dump(mode="json")
    assert ours == api
    assert list(ours) == list(api)


ENUMERATIONS = [
    (model, name, field.annotation)
    for model in Answer.__subclasses__()
    for name, field in model.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, StrEnum)
]


@pytest.mark.parametrize(
    ("model", "name", "kind"), ENUMERATIONS, ids=lambda one: getattr(one, "__name__", str(one))
)
def test_an_unknown_enumeration_value_of_a_newer_keeper_is_kept(model, name, kind):
    """As a string that is not a member; the keeper itself still validates what it writes."""
    adapter = TypeAdapter(Annotated[kind, *model.model_fields[name].metadata])
    with pytest.raises(ValidationError):
        adapter.validate_python("newer")
    newer = adapter.validate_python("newer", context=TOLERANT)
    assert (newer, str(newer), newer in list(kind)) == ("newer", "newer", False)
    assert adapter.dump_json(newer) == b'"newer"'


def test_the_tested_enumerations_include_all_in_responses():
    assert {kind for _, _, kind in ENUMERATIONS} >= {
        State,
        Goal,
        CullState,
        HistoryKind,
        FailureClass,
        StopMethod,
        Scope,
        Rule,
    }


def test_secrets_are_not_in_the_repr():
    server = a_server(token="s3cret", lab_url="http://h/lab?token=s3cret")
    assert "s3cret" not in repr(server)


def test_an_unreadable_ca_file_is_named(tmp_path):
    (tmp_path / "bad.pem").write_text("no certificate")
    for name in ("bad.pem", "absent.pem"):
        with pytest.raises(SettingsError, match=f"cannot read certificates from the file .*{name}"):
            Client("https://keeper", ca_file=tmp_path / name)
    # Plain HTTP needs no CA file.
    Client("http://keeper", ca_file=tmp_path / "absent.pem").close()

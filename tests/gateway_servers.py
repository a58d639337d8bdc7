"""Gateways for tests: two real ones as processes, and a fake one that misbehaves on request."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from environments import GATEWAY, create
from harness import HOLD_PORTS, PATIENCE, free_port, kill_all, plain_python, until
from labkeeper.core.spec import Gateway

PORTS_IN_TURN = """
from itertools import cycle
from enterprise_gateway.services.processproxies.processproxy import BaseProcessProxyABC
ports = cycle(range({first}, {first} + 200))
BaseProcessProxyABC._get_candidate_port = lambda self: next(ports)
"""
"""A configuration file for an Enterprise Gateway.

By default it draws a kernel's ports at random, so a second kernel may get one of them before the
first one listens. Restarting the kernel keeps the ports, so that does not help.
"""
_blocks = itertools.cycle(range(5))
"""Blocks of 200 ports, one for each start of a gateway in this process."""


class RealGateway:
    """A gateway in a process of its own, which tests also call directly."""

    def __init__(self, base: Path, *, authority=None):
        """Create it; with a certificate authority (of trustme) it speaks TLS."""
        self.base = base
        self.authority = authority
        self.port = None
        self.token = uuid.uuid4().hex
        self.headers = {"Authorization": f"token {self.token}"}
        self.process = None

    @property
    def url(self):
        return f"{'https' if self.authority else 'http'}://127.0.0.1:{self.port}"

    def command(self):
        raise AssertionError(f"{type(self).__name__} must override this")

    def variables(self):
        raise AssertionError(f"{type(self).__name__} must override this")

    def start(self):
        base = self.base
        base.mkdir(parents=True, exist_ok=True)
        ours = {"JUPYTER_RUNTIME_DIR": base / "runtime", "HOME": base, **self.variables()}
        # Our own variables must not reach its kernels by inheritance.
        foreign = ("LABKEEPER_", "KERNEL_", "EG_", "KG_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        env = clean | {name: str(value) for name, value in ours.items()}
        log = base / "gateway.log"
        for _ in range(3):
            self.port = free_port()
            with log.open("wb") as stream:
                self.process = subprocess.Popen(
                    self.command(), env=env, cwd=base, stdout=stream, stderr=stream
                )
            until(
                lambda: self.process.poll() is not None or self._answers(),
                what="the gateway to respond or exit",
            )
            # Another process may have taken a port that was free a moment ago.
            if self.process.poll() is None or "already in use" not in log.read_text():
                break
        assert self.process.poll() is None, log.read_text()
        return self

    def _answers(self):
        with contextlib.suppress(httpx.HTTPError):
            return self.get("/api").status_code == 200
        return False

    @property
    def options(self):
        """The fields of a request for a server on this gateway."""
        return {"gateway_url": self.url, "gateway_auth_token": self.token}

    def get(self, path):
        return httpx.get(
            f"{self.url}{path}",
            headers=self.headers,
            trust_env=False,
            verify=False,
            timeout=PATIENCE,
        )

    def kernels(self):
        answer = self.get("/api/kernels")
        answer.raise_for_status()
        return {kernel["id"] for kernel in answer.json()}

    def start_kernel(self):
        """Start a kernel that belongs to no server of ours."""
        answer = httpx.post(
            f"{self.url}/api/kernels",
            headers=self.headers,
            json={"name": "python3"},
            trust_env=False,
            timeout=PATIENCE,
        )
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def end_kernel(self, kernel_id):
        httpx.delete(
            f"{self.url}/api/kernels/{kernel_id}",
            headers=self.headers,
            trust_env=False,
            timeout=PATIENCE,
        )

    def children(self):
        return {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}

    @contextlib.contextmanager
    def suspended(self):
        """Suspend it; its kernels live on."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop(self):
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            kill_all(psutil.Process(self.process.pid).children(recursive=True))
            self.process.kill()
        self.process.wait()


class KernelGateway(RealGateway):
    """A Jupyter Kernel Gateway."""

    def command(self):
        options = {
            "KernelGatewayApp.ip": "127.0.0.1",
            "KernelGatewayApp.port": self.port,
            "KernelGatewayApp.port_retries": 0,
            "JupyterWebsocketPersonality.list_kernels": True,
        }
        if self.authority:
            issued = self.authority.issue_cert("127.0.0.1")
            issued.private_key_and_cert_chain_pem.write_to_path(self.base / "gateway.pem")
            self.authority.cert_pem.write_to_path(self.base / "ca.pem")
            options["KernelGatewayApp.certfile"] = options["KernelGatewayApp.keyfile"] = (
                self.base / "gateway.pem"
            )
        python = plain_python(self.base / "bin")
        configuration = self.base / ".jupyter" / "jupyter_kernel_gateway_config.py"
        configuration.parent.mkdir(exist_ok=True)
        configuration.write_text(HOLD_PORTS)
        return [
            python,
            "-m",
            "kernel_gateway",
            *(f"--{name}={value}" for name, value in options.items()),
        ]

    def variables(self):
        return {"KG_AUTH_TOKEN": self.token}


class EnterpriseGateway(RealGateway):
    """A Jupyter Enterprise Gateway with local kernels; it lets servers choose the variable FOO."""

    def command(self):
        venv = create(GATEWAY)
        # Ports for its kernels that are not used otherwise: `free_port` begins at 12000, and Linux
        # at 32768.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
        first = 3_000 + 1_000 * worker + 200 * next(_blocks)
        configuration = self.base / ".jupyter" / "jupyter_enterprise_gateway_config.py"
        configuration.parent.mkdir(exist_ok=True)
        configuration.write_text(PORTS_IN_TURN.format(first=first))
        return [
            venv / "bin" / "jupyter",
            "enterprisegateway",
            "--ip=127.0.0.1",
            f"--port={self.port}",
            "--port_retries=0",
            "--EnterpriseGatewayApp.list_kernels=True",
        ]

    def variables(self):
        # It refuses kernels for root by default, and tests in a container run as root.
        return {
            "EG_AUTH_TOKEN": self.token,
            "EG_UNAUTHORIZED_USERS": "nobody",
            "EG_CLIENT_ENVS": "FOO",
        }


REAL = {"kernel-gateway": KernelGateway, "enterprise-gateway": EnterpriseGateway}


@dataclass(frozen=True)
class Asked:
    """A request that it received."""

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    """By lower-case name."""


SPEC = {
    "name": "python3",
    "spec": {
        "argv": ["python"],
        "display_name": "Python 3",
        "language": "python",
        "env": {},
        "metadata": {},
    },
    "resources": {},
}


class HostileGateway:
    """A gateway without real kernels that misbehaves as its current `mode` says.

    `mode` is a key of `ANSWERS`; `on_delete` is another one, for requests that delete kernels.
    """

    def __init__(self, mode="well", *, context=None):
        """Create it; with an SSL context its port speaks TLS."""
        self.mode = mode
        self.on_delete = None
        self.kernels = {}
        self.asked = []
        self.port = 0
        """A free port, chosen by the first start."""
        self._context = context
        self._ending = threading.Event()
        self._threads = []
        self._open = set()
        self._lock = threading.Lock()
        self._listener = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    @property
    def url(self):
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    @property
    def options(self):
        """The fields of a request for a server on this gateway."""
        return {"gateway_url": self.url}

    def start(self):
        """Listen, on the same port each time; its kernels are kept across restarts."""
        self._ending.clear()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._run(self._accept, self._listener)
        return self

    def stop(self):
        """Close every connection and the port, as when its process is killed."""
        self.vanish()
        while self._threads:
            self._threads.pop().join()

    def vanish(self):
        """Do the same without waiting, so that a response can call it."""
        self._ending.set()
        with self._lock:
            listener, self._listener = self._listener, None
            sockets = [*self._open, *([listener] if listener else [])]
        for socket_ in sockets:
            with contextlib.suppress(OSError):
                socket_.shutdown(socket.SHUT_RDWR)

    def count(self, method, path):
        """Return how many requests it received for paths with this prefix."""
        return sum(
            asked.method == method and asked.path.startswith(path) for asked in list(self.asked)
        )

    def _run(self, target, *args):
        thread = threading.Thread(target=target, args=args)
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener):
        with listener, contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with self._lock:
                    self._open.add(connection)
                    if self._ending.is_set():
                        connection.close()
                        return
                self._run(self._serve, connection)

    def _serve(self, connection):
        try:
            # Either side may disconnect in the middle: the tests are about that.
            with contextlib.suppress(OSError), self._wrapped(connection) as stream:
                self._answer(stream)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    @contextlib.contextmanager
    def _wrapped(self, connection):
        if self._context is None:
            yield connection
            return
        with self._context.wrap_socket(connection, server_side=True) as stream:
            yield stream

    def _answer(self, stream):
        if self.mode == "garbage":
            # Before any request, as SSH and mail servers do.
            stream.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        with stream.makefile("rb") as lines:
            first = lines.readline().decode(errors="replace").split()
            if len(first) != 3 or not first[2].startswith("HTTP"):
                self.send(stream, 400)
                return
            headers = {k.lower(): v for k, v in http.client.parse_headers(lines).items()}
            body = lines.read(int(headers.get("content-length", 0)))
        asked = Asked(first[0], first[1], headers)
        self.asked.append(asked)
        mode = self.on_delete if self.on_delete and asked.method == "DELETE" else self.mode
        ANSWERS[mode](self, stream, asked, body)

    # Modes

    def well(self, stream, asked, body):
        path = asked.path.partition("?")[0]
        kernel_id = path.rpartition("/")[2]
        if path.endswith("/api/kernelspecs"):
            self.send(stream, 200, {"default": "python3", "kernelspecs": {"python3": SPEC}})
        elif path.endswith("/api/kernels") and asked.method == "POST":
            model = {
                "id": str(uuid.uuid4()),
                "name": "python3",
                "execution_state": "idle",
                "connections": 0,
            }
            self.kernels[model["id"]] = model | {
                "last_activity": "2026-01-01T00:00:00.000000Z",
                "asked": json.loads(body or b"{}"),
            }
            self.send(stream, 201, self.kernels[model["id"]])
        elif path.endswith("/api/kernels"):
            self.send(stream, 200, list(self.kernels.values()))
        elif kernel_id not in self.kernels:
            self.send(stream, 404, {"reason": "no such kernel"})
        elif asked.method == "DELETE":
            del self.kernels[kernel_id]
            self.send(stream, 204)
        else:
            self.send(stream, 200, self.kernels[kernel_id])

    def send(self, stream, status, content=None, *, kind="application/json", more=""):
        body = (
            b""
            if content is None
            else content.encode()
            if isinstance(content, str)
            else json.dumps(content).encode()
        )
        length = "" if status == 204 else f"Content-Length: {len(body)}\r\n"
        head = (
            f"HTTP/1.1 {status} {http.client.responses[status]}\r\n"
            f"Content-Type: {kind}\r\n{more}{length}"
        )
        stream.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)

    def forget(self, stream, asked, _):
        """List no kernels, and fail on requests for a single one."""
        listing = asked.method == "GET" and asked.path.partition("?")[0].endswith("/api/kernels")
        self.send(stream, *((200, []) if listing else (503, {"reason": "busy"})))

    def hang(self, *_):
        self._ending.wait()

    def hang_after_headers(self, stream, *_):
        stream.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        self._ending.wait()

    def drip(self, stream, *_):
        """Answer byte by byte, each one well within any read timeout."""
        stream.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        )
        while not self._ending.wait(0.05):
            stream.sendall(b" ")

    def drip_head(self, stream, *_):
        stream.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self._ending.wait(0.05):
            stream.sendall(b"x")

    def drip_chunk(self, stream, *_):
        """Never finish the chunk size."""
        stream.sendall(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        while not self._ending.wait(0.05):
            stream.sendall(b"0")

    def endless(self, stream, *_):
        stream.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        while not self._ending.is_set():
            stream.sendall(chunk)

    def break_off(self, stream, *_):
        """Announce one byte more than it sends, of a response that is otherwise complete."""
        body = json.dumps({"default": "python3", "kernelspecs": {"python3": SPEC}}).encode()
        head = (
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body) + 1}\r\n\r\n"
        )
        stream.sendall(head.encode() + body)

    def break_off_chunks(self, stream, *_):
        body = json.dumps({"default": "python3", "kernelspecs": {"python3": SPEC}}).encode()
        stream.sendall(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body)
        )

    def die(self, stream, *_):
        """Close the connection and the port for good."""
        stream.close()
        self.vanish()


def _plain(status, content=None, **options):
    return lambda gateway, stream, *_: gateway.send(stream, status, content, **options)


ANSWERS = {
    "well": HostileGateway.well,
    "401": _plain(401, {"reason": "Unauthorized"}),
    "403": _plain(403, {"reason": "Forbidden"}),
    "404": _plain(404, {"reason": "Not Found"}),
    "400": _plain(400, {"reason": "Bad Request"}),
    "500": _plain(500, {"reason": "Internal Server Error"}),
    "503": _plain(503, "<h1>busy</h1>", kind="text/html"),
    "redirect": _plain(302, more="Location: https://login.example/?next=here\r\n"),
    "html": _plain(200, "<!doctype html><title>Welcome</title>", kind="text/html"),
    "markup": _plain(503, {"reason": "<img src=x onerror=alert(1)>\x1b[31m\u202e" + "x" * 10_000}),
    "other json": _plain(200, {"status": "fine"}),
    "json list": _plain(200, []),
    "nothing": _plain(200, ""),
    "close": lambda *_: None,
    "garbage": lambda *_: None,
    "forget": HostileGateway.forget,
    "hang": HostileGateway.hang,
    "hang after headers": HostileGateway.hang_after_headers,
    "drip": HostileGateway.drip,
    "drip chunk": HostileGateway.drip_chunk,
    "drip head": HostileGateway.drip_head,
    "endless": HostileGateway.endless,
    "break off": HostileGateway.break_off,
    "break off chunks": HostileGateway.break_off_chunks,
    "die": HostileGateway.die,
}


def stopped_or_left(report):
    """Return the kernels that a stop was responsible for.

    Those that a slow gateway did not end within the grace period become orphaned kernels.
    """
    return {*report["kernels_stopped"], *report["kernels_left"]}


def a_gateway(host="one", **options):
    """Return a gateway of the spec; it need not exist."""
    return Gateway(f"http://{host}", f"ws://{host}", **options)


def server_context(authority, *, wants_client=False):
    """Return a server's SSL context, with a certificate of this trustme authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if wants_client:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.contextmanager
def black_hole(*, full):
    """Yield the URL of a port that never accepts; a full one completes no handshake."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4 if full else 0):
            crowd = stack.enter_context(socket.socket())
            crowd.setblocking(False)
            crowd.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"

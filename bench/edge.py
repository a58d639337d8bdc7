#!/usr/bin/env python3
"""Compare the edge with nginx and configurable-http-proxy, before one and the same server.

    .venv/bin/python bench/edge.py [--rounds 7] [--only requests,bundle,websocket,memory]

The contenders take turns in one run, with the direct way to the server among them. CPU time is that
of the proxy alone, from the kernel's own accounts, so that the load generator, which needs far more
of it, does not matter: "per core" means per second of that time. Medians of the rounds are printed,
with the ratio to the edge's. Linux only; needs nginx (Debian's package) and the proxy of
`make bench`. Nothing is written.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import environments
from figures import median, percentile
from guard import guarded
from labkeeper.edge.routes import Route
from labkeeper.serve.edge.instances import Instances
from labkeeper.serve.process import LOCK
from progress import BenchError, say

_SMALL: Final = b"x" * 200
_BUNDLE: Final = b"x" * 1_460_000
"""As large as JupyterLab's largest bundle."""
_HUGE: Final = 2**30
_CLIENTS: Final = 50
_SOCKETS: Final = 200
_RATE: Final = 1000
"""Messages a second over all websockets."""
_SECONDS: Final = 3.0
"""Of each measurement."""
_BELOW: Final = "/servers/lab/"
_END: Final = b"\r\n\r\n"


class Backend(asyncio.Protocol):
    """The server behind the proxies: canned answers, and an echo in place of a websocket."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._echoes = False
        self._received = b""

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._echoes:
            self._transport.write(data)
            return
        self._received += data
        while _END in self._received:
            head, _, self._received = self._received.partition(_END)
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        path = head.split(b" ", 2)[1].partition(b"?")[0]
        if path.endswith(b"/ws"):
            self._echoes = True
            self._transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Accept: x" + _END
            )
        elif path.endswith(b"/bundle"):
            self._send(_BUNDLE)
        elif path.endswith(b"/huge"):
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d" % _HUGE + _END)
            asyncio.get_running_loop().create_task(self._pour())
        else:
            self._send(_SMALL)

    def _send(self, body: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d" % len(body) + _END + body)

    async def _pour(self) -> None:
        for _ in range(_HUGE // 2**20):
            self._transport.write(bytes(2**20))
            while self._transport.get_write_buffer_size() > 2**20:  # noqa: ASYNC110 - for a bench
                await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to the server."""

    label: str
    port: int
    pids: tuple[int, ...]
    """The processes of the proxy; none without a proxy."""

    def cpu(self) -> float:
        """Return the CPU time of its processes so far, in seconds."""
        paths = (
            path for pid in self.pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
        )
        return sum(int(path.read_text().split()[0]) for path in paths) / 1e9

    def memory(self) -> float:
        """Return the resident memory of its processes in MiB."""
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids)
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


# Contenders


def _start_backend(stack: ExitStack) -> int:
    """Serve in a process of its own; return the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    child = os.fork()
    if child == 0:
        asyncio.run(_serve(listener))
        os._exit(0)
    stack.callback(os.kill, child, 9)
    with listener:
        return int(listener.getsockname()[1])


async def _serve(listener: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(Backend, sock=listener, backlog=1024)
    await server.serve_forever()


def _start_edge(stack: ExitStack, place: Path, backend: int) -> Contender:
    state_dir = place / "edge"
    state_dir.mkdir()
    descriptor = os.open(state_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    public = socket.create_server(("127.0.0.1", 0))
    port = public.getsockname()[1]
    instances = Instances(state_dir, state_dir / "run", ("127.0.0.1", port))
    instances.find()
    link = instances.start(public)
    stack.callback(instances.bury, link)
    route = Route("lab", 1, "127.0.0.1", backend, _BELOW, "key")
    fields = {name: getattr(route, name) for name in route.__slots__}
    told = {"domain": "", "hosts": [], "access_log": False, "longest_body": 0}
    link.send({"do": "all", **told, "routes": [fields], "sessions": []})
    stack.callback(link.send, {"do": "stop"})
    return Contender("edge", port, (link.process.pid,))


_NGINX: Final = """
worker_processes 1;
daemon off;
pid {place}/nginx.pid;
error_log {place}/nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {place};
  proxy_temp_path {place};
  fastcgi_temp_path {place};
  uwsgi_temp_path {place};
  scgi_temp_path {place};
  keepalive_requests 1000000;
  upstream lab {{ server 127.0.0.1:{backend}; keepalive 64; keepalive_requests 1000000; }}
  map $http_upgrade $lab_connection {{ default upgrade; '' ''; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://lab;
      proxy_http_version 1.1;
      proxy_max_temp_file_size 0;
      proxy_set_header Host $host;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $lab_connection;
      proxy_set_header X-Forwarded-For $remote_addr;
    }}
  }}
}}
"""


def _start_nginx(stack: ExitStack, place: Path, backend: int) -> Contender:
    program = shutil.which("nginx")
    if program is None:
        raise BenchError("cannot find nginx; `apt-get install nginx-light` installs it")
    port = _free_port()
    directory = place / "nginx"
    directory.mkdir(mode=0o755)
    config = directory / "nginx.conf"
    config.write_text(_NGINX.format(place=directory, port=port, backend=backend))
    child = subprocess.Popen([program, "-c", config, "-p", directory])
    stack.callback(child.wait)
    stack.callback(child.terminate)
    _wait_for(port)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    return Contender("nginx", port, tuple(map(int, workers)))


def _start_chp(stack: ExitStack, place: Path, backend: int) -> Contender:
    found = environments.prepare(Path(__file__).resolve().parent.parent, place, with_hub=True)
    port, api = _free_port(), _free_port()
    command = ["configurable-http-proxy", "--ip", "127.0.0.1", "--port", str(port)]
    command += ["--api-ip", "127.0.0.1", "--api-port", str(api), "--log-level", "error"]
    command += ["--default-target", f"http://127.0.0.1:{backend}"]
    path = found.path(found.hub)
    program = shutil.which(command[0], path=path) or command[0]
    known = {**os.environ, "PATH": path, "CONFIGPROXY_AUTH_TOKEN": "x"}
    child = subprocess.Popen([program, *command[1:]], env=known)
    stack.callback(child.wait)
    stack.callback(child.terminate)
    _wait_for(port)
    return Contender("configurable-http-proxy", port, (child.pid,))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise BenchError(f"nothing listens on port {port}")


# Measurements


def _request(path: str, *headers: str) -> bytes:
    head = [f"GET {_BELOW}{path}?token=x HTTP/1.1", "Host: x", *headers, "", ""]
    return "\r\n".join(head).encode()


class Caller(asyncio.Protocol):
    """Sends one request after the other, and counts the answers."""

    def __init__(self, request: bytes, body: int) -> None:
        self.count = 0
        self._request, self._body = request, body
        self._left = 0
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if not self._left:
            head, found, data = (self._head + data).partition(_END)
            self._head = b"" if found else head
            if not found:
                return
            self._left = self._body
        self._left -= len(data)
        if not self._left:
            self.count += 1
            self._transport.write(self._request)

    def close(self) -> None:
        """End."""
        self._transport.abort()


async def _rate(contender: Contender, path: str, body: int, clients: int) -> dict[str, float]:
    """Return the answers per second of CPU time of the proxy, and per second."""
    loop = asyncio.get_running_loop()
    callers = [
        (
            await loop.create_connection(
                lambda: Caller(_request(path), body), "127.0.0.1", contender.port
            )
        )[1]
        for _ in range(clients)
    ]
    await asyncio.sleep(0.3)
    before, begun, cpu = sum(c.count for c in callers), time.monotonic(), contender.cpu()
    await asyncio.sleep(_SECONDS)
    count = sum(c.count for c in callers) - before
    took, used = time.monotonic() - begun, contender.cpu() - cpu
    for caller in callers:
        caller.close()
    await asyncio.sleep(0.1)
    figures = {"per second": count / took}
    return figures | ({"per core": count / used} if used else {})


class Echo(asyncio.Protocol):
    """One websocket of the client: sends the time, and gets it back."""

    def __init__(self, times: list[float]) -> None:
        self.open = asyncio.get_running_loop().create_future()
        self._times = times

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.write(
            _request(
                "ws",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                "Sec-WebSocket-Version: 13",
            )
        )

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if not self.open.done():
            self.open.set_result(None)
            return
        for (sent,) in struct.iter_unpack("d", data):
            self._times.append(time.perf_counter() - sent)

    def send(self) -> None:
        """Send the time."""
        self.transport.write(struct.pack("d", time.perf_counter()))


async def _websocket(contender: Contender) -> dict[str, float]:
    """Return the time of a message and its echo, in microseconds, and the CPU time of a message."""
    loop, times = asyncio.get_running_loop(), list[float]()
    echoes = [
        (await loop.create_connection(lambda: Echo(times), "127.0.0.1", contender.port))[1]
        for _ in range(_SOCKETS)
    ]
    await asyncio.gather(*(echo.open for echo in echoes))
    cpu, begun = contender.cpu(), time.monotonic()
    for number in range(int(_SECONDS * _RATE)):
        await asyncio.sleep(max(0.0, begun + number / _RATE - time.monotonic()))
        echoes[number % _SOCKETS].send()
    await asyncio.sleep(0.2)
    used = contender.cpu() - cpu
    for echo in echoes:
        echo.transport.abort()
    await asyncio.sleep(0.1)
    return {
        "p50": percentile(times, 50) * 1e6,
        "p99": percentile(times, 99) * 1e6,
        "CPU": used / len(times) * 1e6,
    }


async def _memory(contender: Contender) -> dict[str, float]:
    """Return the memory at rest and after a large answer, in MiB, and MB per CPU second."""
    before, cpu = contender.memory(), contender.cpu()
    reader, writer = await asyncio.open_connection("127.0.0.1", contender.port)
    writer.write(_request("huge"))
    await reader.readuntil(_END)
    left = _HUGE
    while left:
        left -= len(await reader.read(2**20))
    writer.close()
    used = contender.cpu() - cpu
    return {
        "before 1 GiB": before,
        "after 1 GiB": contender.memory(),
        **({"MB per core": _HUGE / 1e6 / used} if used else {}),
    }


Measurement = Callable[[Contender], "dict[str, float]"]


def _requests(contender: Contender) -> dict[str, float]:
    return asyncio.run(_rate(contender, "small", len(_SMALL), _CLIENTS))


def _bundle(contender: Contender) -> dict[str, float]:
    return asyncio.run(_rate(contender, "bundle", len(_BUNDLE), 6))


MEASUREMENTS: Final[dict[str, tuple[str, Measurement]]] = {
    "requests": (f"requests over {_CLIENTS} connections", _requests),
    "bundle": ("answers of 1.46 MB over 6 connections", _bundle),
    "websocket": (
        f"websocket: {_SOCKETS} open, {_RATE} messages a second, µs",
        lambda contender: asyncio.run(_websocket(contender)),
    ),
    "memory": ("memory (MiB) around one answer of 1 GiB", lambda c: asyncio.run(_memory(c))),
}


@contextmanager
def _contenders(place: Path) -> Iterator[list[Contender]]:
    with ExitStack() as stack:
        backend = _start_backend(stack)
        yield [
            Contender("direct", backend, ()),
            _start_edge(stack, place, backend),
            _start_nginx(stack, place, backend),
            _start_chp(stack, place, backend),
        ]


def _show(title: str, found: dict[str, list[dict[str, float]]]) -> None:
    names = list(dict.fromkeys(name for rounds in found.values() for one in rounds for name in one))
    print(f"\n{title:60}" + "".join(f"{name:>16}" for name in names))
    ours = {name: median([one[name] for one in found["edge"]]) for name in names}
    for label, rounds in found.items():
        cells = ""
        for name in names:
            values = [one[name] for one in rounds if name in one]
            if not values:
                cells += f"{'-':>16}"
                continue
            ratio = median(values) / ours[name] if ours[name] else 0.0
            cells += f"{median(values):>9,.0f} {ratio:>5.2f}x"
        print(f"  {label:58}{cells}")


def main(place: Path) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(MEASUREMENTS))
    chosen = parser.parse_args()
    with _contenders(place) as contenders:
        for name in chosen.only.split(","):
            title, measure = MEASUREMENTS[name]
            found: dict[str, list[dict[str, float]]] = {c.label: [] for c in contenders}
            for number in range(chosen.rounds):
                order = (
                    contenders[number % len(contenders) :] + contenders[: number % len(contenders)]
                )
                for contender in order:
                    found[contender.label].append(measure(contender))
                say(f"{name}: {number + 1} of {chosen.rounds}")
            _show(title, found)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))

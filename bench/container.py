#!/usr/bin/env python3
"""Compare the Docker image with a keeper of this checkout that runs on the host.

It uses the Docker Engine that `docker` connects to; the two take turns. Usage:

    .venv/bin/python bench/container.py [--image jupyter-server] [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from figures import median, slow_end
from progress import BenchError, say
from web import free_port, request, request_json

_TIMEOUT: Final = 120.0
_WARM_UPS: Final = 2


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--image", default="jupyter-server", help="image to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="measured rounds (default: %(default)s)"
    )
    chosen = parser.parse_args()
    image = json.loads(_docker("inspect", chosen.image))[0]
    size, base = image["Size"] / 1e6, _base_size(chosen.image) / 1e6
    print(f"image size: {size:.0f} MB, including {base:.0f} MB for its base image")

    say("docker run: until the API responds, and until a POST is served by a fork")
    answering, served = [], []
    for number in range(chosen.repeats // 3 + _WARM_UPS):
        with container(chosen.image) as (api, key, begun):
            answering.append(time.perf_counter() - begun)
            _wait_for_fork(api, key)
            served.append(time.perf_counter() - begun)
            if number < _WARM_UPS:
                answering.clear()
                served.clear()
    _print("docker run until the API responds", answering)
    _print("docker run until a POST is served by a fork", served)

    say("POST until the server is ready, in the container and on the host")
    with container(chosen.image) as (api, key, _), keeper() as (other, other_key):
        for where in ((api, key), (other, other_key)):
            _wait_for_fork(*where)
        memory = _memory(api.rpartition(":")[2])
        print(f"memory of the idle container: {memory:.0f} MiB (keeper and fork server)")
        inside, outside = [], []
        for number in range(chosen.repeats + _WARM_UPS):
            inside.append(_start(api, key))
            outside.append(_start(other, other_key))
            if number < _WARM_UPS:
                inside.clear()
                outside.clear()
    _print("POST to ready, in the container", inside)
    _print("POST to ready, on the host", outside)
    print(f"container / host: {median(inside) / median(outside):.2f}")
    return 0


@contextmanager
def container(image: str) -> Iterator[tuple[str, str, float]]:
    """Run the image until its API responds; yield API, authorization and time of `docker run`."""
    port, token = free_port(), secrets.token_urlsafe(24)
    name = f"labkeeper-bench-{port}"
    begun = time.perf_counter()
    try:
        options = ["--name", name, "-p", f"127.0.0.1:{port}:80", "-e", f"LABKEEPER_TOKEN={token}"]
        _docker("run", "-d", *options, image)
        api = f"http://127.0.0.1:{port}"
        _until_answering(api)
        yield api, f"Bearer {token}", begun
    finally:
        subprocess.run(["docker", "rm", "-f", "-v", name], capture_output=True, check=False)


@contextmanager
def keeper() -> Iterator[tuple[str, str]]:
    """Run a keeper of this checkout; yield its API and authorization."""
    port, token = free_port(), secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory() as home:
        ours = {
            "PORT": str(port),
            "LAB_PORT": str(free_port()),
            "TOKEN": token,
            "STATE_DIR": f"{home}/state",
            "NOTEBOOK_DIR": home,
        }
        env = (
            os.environ
            | {"HOME": home}
            | {f"LABKEEPER_{setting}": value for setting, value in ours.items()}
        )
        command = [sys.executable, "-m", "labkeeper", "serve", "--log-level", "error"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        try:
            _until_answering(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}", f"Bearer {token}"
        finally:
            process.terminate()
            process.wait()


def _until_answering(api: str) -> None:
    until = time.monotonic() + _TIMEOUT
    while time.monotonic() < until:
        try:
            if request("GET", f"{api}/readyz", timeout=5)[0] == 200:  # noqa: PLR2004 - HTTP's own
                return
        except OSError:
            time.sleep(0.005)
    raise BenchError(f"{api} does not respond")


def _wait_for_fork(api: str, key: str) -> None:
    while True:
        server = request_json("POST", f"{api}/api/servers", key, {})
        _end(api, key)
        if server["launched_by"] == "fork":
            return


def _start(api: str, key: str) -> float:
    begun = time.perf_counter()
    server = request_json("POST", f"{api}/api/servers", key, {})
    seconds = time.perf_counter() - begun
    _end(api, key)
    if server["launched_by"] != "fork":
        raise BenchError(f"a server was not forked: {server['exec_reason']}")
    # Meanwhile the fork server prepares a child for the next start.
    time.sleep(0.5)
    return seconds


def _end(api: str, key: str) -> None:
    request_json("DELETE", f"{api}/api/servers/default", key)


def _memory(port: str) -> float:
    """Return the container's memory in MiB, as Docker counts it: without reclaimable cache."""
    time.sleep(3)
    stats = _docker("stats", "--no-stream", "--format", "{{.MemUsage}}", f"labkeeper-bench-{port}")
    used = stats.split("/")[0].strip()
    return float(used[:-3]) * {"MiB": 1, "GiB": 1024, "KiB": 1 / 1024}[used[-3:]]


def _base_size(image: str) -> int:
    """Return the size of the layers below our own, in bytes."""
    columns = "{{.Size}}\t{{.CreatedBy}}"
    history = _docker("history", "--no-trunc", "--human=false", "--format", columns, image)
    layers = [entry.split("\t") for entry in history.splitlines()]
    label = "LABEL org.opencontainers.image.title"
    ours = next(number for number, (_, by) in enumerate(layers) if label in by)
    return sum(int(size) for size, _ in layers[ours + 1 :])


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"docker {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def _print(what: str, seconds: list[Any]) -> None:
    middle, slow = median(seconds), slow_end(seconds)
    print(f"{what}: median {middle:.3f} s, slow end {slow:.3f} s, of {len(seconds)}")


if __name__ == "__main__":
    sys.exit(main())

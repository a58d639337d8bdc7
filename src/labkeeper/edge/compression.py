"""Compresses answers of Labs: collects a body, compresses it as a whole, and hands it out.

Long bodies are compressed in a thread, so that the loop can go on: neither brotli nor zlib holds
Python's lock meanwhile. What a Lab calls immutable, as it does its bundles, is kept compressed
under the hash of its content. So all Labs share it, and the users of each still only get what it
has sent itself: no Lab can choose what another one's users receive.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

import brotli

from labkeeper.edge import codings
from labkeeper.edge.heads import Answer, Request

_SHORT: Final = 32 * 1024
"""Bytes of a body that is compressed at once, in at most half a millisecond."""
_IN_WORK: Final = 16 * 1024 * 1024
"""Bytes that may be collected or wait to be sent; beyond them answers are passed on as they are."""
_COLLECT_WITHIN: Final = 3.0
"""Seconds after which a body that is not complete is passed on as it is."""
_KEPT: Final = 8 * 1024 * 1024
"""Bytes of compressed bundles that are kept; one version of JupyterLab has 1.3 million."""
_PIECE: Final = 64 * 1024
"""Bytes that are handed out at once."""
_FAST: Final = 4
"""Level of brotli, or of zlib, for what is compressed once."""
_WELL: Final = 5
"""Level for what is kept."""
_GZIP: Final = 16 + zlib.MAX_WBITS
"""Has zlib write gzip's format."""


class Parcel:
    """One answer that is collected and compressed."""

    def __init__(
        self, compressor: Compressor, answer: Answer, coding: bytes, late: asyncio.TimerHandle
    ) -> None:
        """`late` tells the owner that the Lab takes too long for this."""
        self.is_held = False
        """Whether the client takes no more at the moment."""
        self.is_whole = True
        """Whether no more of the body follows what can be taken."""
        self._compressor = compressor
        self._answer = answer
        self._coding = coding
        self._late = late
        self._collected = bytearray()
        self._work: asyncio.Future[bytes] | None = None
        self._content = memoryview(b"")
        self._size = answer.length or 0
        """Bytes that it takes of those in work."""
        compressor.in_work += self._size

    def add(self, content: bytes) -> None:
        """Collect a part of the body."""
        self._collected += content

    def compress(self, ready: Callable[[Answer], None]) -> None:
        """Compress the collected body; then call `ready` with the head, at once or later."""
        self._late.cancel()
        body, self._collected = bytes(self._collected), bytearray()
        if len(body) <= _SHORT:
            ready(self._head(body, _compress(body, self._coding, _FAST)))
            return

        def done(work: asyncio.Future[bytes]) -> None:
            if not work.cancelled():
                # An error can only mean that there is no memory: it is sent as it is.
                ready(self._head(body, body if work.exception() else work.result()))

        kept = codings.is_immutable(self._answer)
        try:
            self._work = self._compressor.work(body, self._coding, kept=kept)
        except RuntimeError:
            ready(self._head(body, body))
        else:
            self._work.add_done_callback(done)

    def leave(self) -> Answer:
        """Leave the body uncompressed, of which a part was collected; return its head."""
        self.is_whole = False
        self._content, self._collected = memoryview(self._collected), bytearray()
        return codings.varying(self._answer)

    def _head(self, body: bytes, compressed: bytes) -> Answer:
        """Choose what is sent; return its head."""
        is_shorter = len(compressed) < len(body)
        self._content = memoryview(compressed if is_shorter else body)
        self._resize(len(self._content))
        if is_shorter:
            return codings.coded(self._answer, self._coding, len(compressed))
        return codings.varying(self._answer)

    def take(self) -> bytes:
        """Take the next piece to send; empty: there is no more."""
        piece, self._content = self._content[:_PIECE], self._content[_PIECE:]
        return bytes(piece)

    def close(self) -> None:
        """Forget it, whether or not it was sent."""
        self._late.cancel()
        if self._work is not None:
            self._work.cancel()
        self._collected, self._content = bytearray(), memoryview(b"")
        self._resize(0)

    def _resize(self, size: int) -> None:
        self._compressor.in_work += size - self._size
        self._size = size


class Compressor:
    """What all answers share: the thread, the compressed bundles, and how much is in work."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.in_work = 0
        self._loop = loop
        self._thread = _new_thread()
        self._bundles = _Bundles()

    def begin(
        self, request: Request, answer: Answer, late: Callable[[], None]
    ) -> tuple[Answer, Parcel | None]:
        """Return the head of a Lab's answer, and what collects it if it is to be compressed.

        `late` is called if the Lab takes too long for this.
        """
        if answer.status == HTTPStatus.NOT_MODIFIED:
            return codings.weakened(codings.varying(answer)), None
        if not codings.is_compressible(request, answer):
            return answer, None
        coding = codings.coding_for(request)
        if coding is None or self.in_work + (answer.length or 0) > _IN_WORK:
            return codings.varying(answer), None
        if request.method == b"HEAD":
            return codings.coded(answer, coding, None), None
        timer = self._loop.call_later(_COLLECT_WITHIN, late)
        return answer, Parcel(self, answer, coding, timer)

    def work(self, body: bytes, coding: bytes, *, kept: bool) -> asyncio.Future[bytes]:
        """Compress a body in the thread; `kept`: as one of the bundles.

        Raises RuntimeError if it cannot be started: its user has too many of them.
        """
        try:
            if kept:
                return self._loop.run_in_executor(self._thread, self._bundles.get, body, coding)
            return self._loop.run_in_executor(self._thread, _compress, body, coding, _FAST)
        except RuntimeError:
            # The body would stay in the queue.
            self._thread = _new_thread()
            raise

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class _Bundles:
    """Compressed bundles by what they are, the longest unused one first. The thread owns them."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[bytes, bytes], bytes] = OrderedDict()
        self._size = 0

    def get(self, body: bytes, coding: bytes) -> bytes:
        """Return a bundle compressed."""
        key = coding, hashlib.sha256(body).digest()
        content = self._found.pop(key, None)
        if content is None:
            content = _compress(body, coding, _WELL)
            self._size += len(content)
        self._found[key] = content
        while self._size > _KEPT:
            self._size -= len(self._found.popitem(last=False)[1])
        return content


def _new_thread() -> concurrent.futures.ThreadPoolExecutor:
    """Return what starts the thread when there is work for it."""
    return concurrent.futures.ThreadPoolExecutor(1, "compressor")


def _compress(body: bytes, coding: bytes, quality: int) -> bytes:
    if coding == codings.BROTLI:
        return bytes(brotli.compress(body, quality=quality))
    return zlib.compress(body, quality, _GZIP)

"""Bodies in pieces: any split of the input gives the same content and the same rest."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkeeper.edge.bodies import BadBody, Chunked, Sized, UntilClosed, chunk

RULES = settings(deadline=None, database=None)
CUTS = st.lists(st.integers(0, 400), max_size=12)
REST = st.sampled_from([b"", b"\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]) | st.binary(
    max_size=9
)
EXTENSIONS = st.sampled_from([b"", b";a", b"; a=b", b';q="\xe4;"', b";\t", b";" + b"x" * 200])
TRAILERS = st.sampled_from(
    [b"", b"a: b\r\n", b"a:\r\nX-Y: \xff\r\n", b"t: " + b"x" * 300 + b"\r\n"]
)


@st.composite
def chunked(draw):
    """Return content, and a chunked body of it."""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
    size = draw(st.sampled_from([b"%x", b"%X", b"%07x"]))
    lines = [size % len(piece) + draw(EXTENSIONS) + b"\r\n" + piece + b"\r\n" for piece in pieces]
    last = draw(st.sampled_from([b"0", b"000"])) + draw(EXTENSIONS) + b"\r\n"
    return b"".join(pieces), b"".join(lines) + last + draw(TRAILERS) + b"\r\n"


def pieces_of(data, cuts):
    """Split data at some offsets."""
    at = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[begin:end] for begin, end in itertools.pairwise(at)]


def feed(body, pieces):
    """Return content and rest, as a connection would find them."""
    content, rest = b"", b""
    for piece in pieces:
        if body.ended:
            rest += piece
        else:
            more, rest = body.feed(piece)
            content += more
            assert body.ended or rest == b""
    return content, rest


@RULES
@given(st.binary(max_size=200), st.integers(0, 250), CUTS)
def test_sized_body_ends_at_its_length_in_any_split(data, length, cuts):
    body = Sized(length)
    assert feed(body, pieces_of(data, cuts)) == (data[:length], data[length:])
    assert body.ended == (len(data) >= length)


@RULES
@given(st.binary(max_size=200), CUTS)
def test_body_until_the_end_of_its_connection_is_everything(data, cuts):
    body = UntilClosed()
    assert feed(body, pieces_of(data, cuts)) == (data, b"")
    assert not body.ended


@RULES
@given(chunked(), REST, CUTS)
def test_chunked_body_is_the_same_in_any_split(case, rest, cuts):
    content, raw = case
    for pieces in (pieces_of(raw + rest, cuts), [raw + rest], pieces_of(raw + rest, range(2000))):
        body = Chunked()
        assert feed(body, pieces) == (content, rest)
        assert body.ended


@RULES
@given(st.binary(min_size=1, max_size=100))
def test_chunk_is_what_it_reads(content):
    assert feed(Chunked(), [chunk(content), b"0\r\n\r\n!"]) == (content, b"!")


BAD = [
    b"\r\n", b"\n", b"g\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b"1 \r\n", b" 1\r\n", b"1\t\r\n",
    b"1\n", b"1;a\n", b"1\r\r\n", b"1;a\rb\r\n", b"1;\0\r\n", b"1,1\r\n", b"1_0\r\n", b"\xb2\r\n",
    b"1" * 16 + b"\r\n", b"0" * 16 + b"\r\n", b"1;" + b"x" * 1024 + b"\r\n", b"x" * 1025,
    b"1\r\nab", b"1\r\na\n", b"1\r\na\rb", b"2\r\na\r\n0\r\n\r\n", b"1\r\na0\r\n\r\n",
    b"1\r\na\r\n\r\n", b"0\r\n a: b\r\n\r\n", b"0\r\nno colon\r\n\r\n", b"0\r\na : b\r\n\r\n",
    b"0\r\na: \0\r\n\r\n", b"0\r\na: b\nc: d\r\n\r\n", b"0\r\n: b\r\n\r\n",
    b"0\r\n" + b"a: b\r\n" * 1366 + b"\r\n", b"0\r\n" + b"x" * 8193, b"0\r\nGET / HTTP/1.1\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD)
@RULES
@given(CUTS)
def test_malformed_chunks_are_refused_in_any_split(raw, cuts):
    for pieces in (pieces_of(raw, cuts), [raw]):
        with pytest.raises(BadBody):
            feed(Chunked(), pieces)


@pytest.mark.parametrize("raw", BAD)
def test_malformed_chunks_are_refused_byte_by_byte(raw):
    with pytest.raises(BadBody):
        feed(Chunked(), pieces_of(raw, range(len(raw))))


@pytest.mark.parametrize(
    ("raw", "fits"),
    [
        (b"1;" + b"x" * 1020 + b"\r\na\r\n0\r\n\r\n", True),
        (b"1;" + b"x" * 1021 + b"\r\na\r\n0\r\n\r\n", False),
        (b"1\r\na\r\n0\r\na: " + b"x" * 8185 + b"\r\n\r\n", True),
        (b"1\r\na\r\n0\r\na: " + b"x" * 8186 + b"\r\n\r\n", False),
    ],
)
def test_lines_between_chunks_have_limits(raw, fits):
    for pieces in ([raw], pieces_of(raw, range(len(raw)))):
        if fits:
            assert feed(Chunked(), pieces) == (b"a", b"")
        else:
            with pytest.raises(BadBody):
                feed(Chunked(), pieces)


@pytest.mark.parametrize("body", [Chunked(), Sized(2**50), UntilClosed()])
def test_body_in_single_bytes_holds_no_memory(body):
    if isinstance(body, Chunked):
        body.feed(b"fffffffff\r\n")
    tracemalloc.start()
    try:
        for _ in range(20_000):
            assert body.feed(b"x") == (b"x", b"")
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


def test_many_small_chunks_are_read_without_copies_of_the_rest():
    """Copies would take a time that grows with the square of a piece's length."""
    copied = 0

    class Counting(bytes):
        """Counts the bytes that are cut from it."""

        __slots__ = ()

        def __getitem__(self, key):
            nonlocal copied
            part = super().__getitem__(key)
            copied += len(part) if isinstance(key, slice) else 0
            return Counting(part) if isinstance(key, slice) else part

        def __radd__(self, other):
            return Counting(bytes(other) + bytes(self))

        def __add__(self, other):
            return Counting(bytes(self) + bytes(other))

    raw = Counting(b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n")
    body = Chunked()
    content, rest = body.feed(raw)
    assert (content, bytes(rest)) == (b"x" * 10_000, b"")
    assert copied <= 2 * len(raw)

"""Fuzz texts from people, callers and servers: durations, logs, exit causes and keys.

Each is processed in bounded time.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import FUZZ, JSON
from labkeeper.core.durations import LONGEST, duration, format_duration, format_time
from labkeeper.core.server import Exit, FailureClass
from labkeeper.core.spec import server_name
from labkeeper.events.webhooks import key_of
from labkeeper.jupyter.failures import cause_of
from labkeeper.scrub import _LOOKS, HIDDEN, Secrets, _hide, scrub
from labkeeper.terminal import visible, visible_line

DURATIONS = st.from_regex(r"\A([0-9]{1,6}[dhms ]){0,4}\Z") | st.text() | JSON
PIECES = st.sampled_from(
    [
        "token=",
        "token",
        '"',
        "\\",
        "'",
        ": ",
        "authorization: ",
        "bearer ",
        "://",
        "@",
        ":",
        "a",
        "f" * 47,
        "%3D",
        "password",
        " ",
        "=",
    ]
)
HOSTILE = (
    st.lists(PIECES, max_size=8)
    .map("".join)
    .flatmap(lambda text: st.integers(1, 3000).map(lambda times: text * times))
)
LONG = 200_000


@FUZZ
@given(DURATIONS)
@example("9" * 100_000)
@example("1d" * 100_000)
@example(10**5000)
def test_duration_is_within_bounds_or_rejected(text):
    with contextlib.suppress(ValueError):
        seconds = duration(text)
        assert 0 <= seconds <= LONGEST
        assert format_duration(seconds)


@FUZZ
@given(st.integers(0, 366), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_duration_is_the_sum_of_its_parts(days, hours, minutes, seconds):
    total = days * 86400 + hours * 3600 + minutes * 60 + seconds
    with contextlib.suppress(ValueError):
        assert duration(f"{days}d{hours}h{minutes}m{seconds}s") == total <= LONGEST


@FUZZ
@given(st.floats(0, 253402300799))
def test_any_time_can_be_formatted(at):
    assert format_time(at).endswith("Z")


@FUZZ
@given(st.text())
@example("a" * 64)
@example("a\n")
def test_server_name_is_a_valid_host_name_or_rejected(text):
    with contextlib.suppress(ValueError):
        assert server_name(text).encode("idna")


@FUZZ
@given(HOSTILE.map(lambda text: text[:LONG]))
def test_scrubbing_takes_bounded_time(text):
    scrub(text)


COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


@FUZZ
@given(
    st.lists(
        st.sampled_from(["\x1b", "\x1b[", "m", "0", ";", "31", "\n", "\r", "\x9b", "]52;", "\x07"])
        | st.text()
    ).map("".join)
)
@example("\x1b[" * 50_000)
@example("\x1b[1m" * 50_000 + "\r")
def test_control_sequences_do_not_reach_the_terminal(text):
    """Except for colours, which are reset in the same line; other text is unchanged."""
    shown = visible(text)
    plain = COLOUR.sub("", shown).replace("\r\n", "\n")
    assert [
        letter for letter in plain if unicodedata.category(letter) == "Cc" and letter not in "\t\n"
    ] == []
    assert all(
        found[-1] in {"\x1b[m", "\x1b[0m"}
        for line in shown.split("\n")
        if (found := COLOUR.findall(line))
    )
    assert shown == text or any(unicodedata.category(letter) == "Cc" for letter in text)
    assert visible_line(text).count("\n") == 0


SECRETS = st.sampled_from(
    ["KEY", "SeCrEt", "lk_" + "0a" * 6 + "_" + "w" * 43, "Bearer ", "kE7f-abcd", "kE7f", "variable"]
)


@FUZZ
@given(st.lists(PIECES | SECRETS | st.text()).map("".join))
def test_scrub_shortcut_gives_the_same_result_as_the_full_search(text):
    known = Secrets("kE7f-abcd", "variable")
    assert scrub(text, known) == _LOOKS.sub(_hide, re.sub("(?:kE7f-abcd|variable)+", HIDDEN, text))


@FUZZ
@given(
    st.text(),
    st.text(st.characters(codec="utf-8", blacklist_categories=["Cc"]), min_size=8, max_size=40),
    st.text(),
)
def test_known_secret_is_always_redacted(before, secret, after):
    assert secret in HIDDEN or secret not in scrub(
        f"{before}{secret}{after}", Secrets(secret)
    ).replace(HIDDEN, "\0")


@FUZZ
@given(
    st.builds(Exit, code=st.none() | st.integers(), signal=st.none() | st.text()),
    st.lists(st.text() | HOSTILE, max_size=3),
)
def test_every_exit_has_a_failure_class(end, tail):
    kind, line = cause_of(end, tail)
    assert isinstance(kind, FailureClass)
    assert "\n" in "".join(tail) or "\n" not in line


@FUZZ
@given(st.text() | st.binary(max_size=80).map(lambda data: "whsec_" + data.decode("latin-1")))
def test_webhook_key_has_an_allowed_length_or_is_rejected(text):
    with contextlib.suppress(ValueError):
        assert 24 <= len(key_of(text)) <= 64

"""Durations and times as text."""

from __future__ import annotations

import pytest

from labkeeper.core.durations import duration, format_duration, format_time, moment


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0, 0),
        (90, 90),
        (1.5, 1.5),
        ("90m", 5400),
        ("2h", 7200),
        ("1d12h", 129600),
        ("45s", 45),
        ("45", 45),
        ("1H 30M", 5400),
        ("0", 0),
    ],
)
def test_a_duration_is_a_number_of_seconds_or_text(given, seconds):
    assert duration(given) == seconds


@pytest.mark.parametrize(
    "given",
    [
        "",
        " ",
        "h",
        "2x",
        "12h1d",
        "-1h",
        -1,
        float("nan"),
        float("inf"),
        True,
        None,
        [],
        "367d",
        "1e3",
    ],
)
def test_an_invalid_duration_is_refused_with_the_rule(given):
    with pytest.raises(ValueError, match="must be seconds as a number, or a text such as '90m'"):
        duration(given)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59.6, "1 min"),
        (7380, "2 h 3 min"),
        (7200, "2 h"),
        (90061, "1 d 1 h"),
        (86401, "1 d"),
        (3601, "1 h"),
    ],
)
def test_a_duration_is_formatted_in_its_two_largest_units(seconds, told):
    assert format_duration(seconds) == told


def test_a_time_is_formatted_in_utc():
    assert format_time(1.5) == "1970-01-01T00:00:01.500Z"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:01Z", 1.0),
        ("1970-01-01T02:00:00.500+01:00", 3600.5),
        (format_time(1764000000.25), 1764000000.25),
    ],
)
def test_a_time_is_read_as_it_is_written(text, seconds):
    assert moment(text).timestamp() == seconds


@pytest.mark.parametrize("text", ["", "now", "1h", "2026-12-01", "2026-12-01T08:00:00"])
def test_a_time_without_an_offset_is_none(text):
    with pytest.raises(ValueError, match=r"offset|isoformat"):
        moment(text)

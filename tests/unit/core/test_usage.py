"""The history of usage: levels, aggregation and bounds."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkeeper.core.server import Load, Sample, Usage
from labkeeper.core.usage import UNKNOWN, Point, Series, history, levels, recent

LEVELS = levels(5.0)
FINE = LEVELS.fine
START = 1_800_000_000
"""The start of an interval of every level."""


def sample(at, memory=0, cpus=0.0, *, generation=1, kernels=None):
    load = None if kernels is None else Load(kernels, 0)
    return Sample(generation, at, Usage(memory, 0.0, 1, 1), cpus, load)


def point(at, memory=0, cpus=0.0, *, level=FINE, **others):
    return level.point(sample(at, memory, cpus, **others))


MEASURED = st.lists(
    st.tuples(st.floats(0, 20_000), st.integers(0, 2**36), st.floats(0, 64), st.integers(0, 2**16)),
    min_size=1,
    max_size=60,
)
"""Samples in any order, as of a clock that is set back and forth: seconds, memory, processors,
kernels."""


def test_the_levels_are_an_hour_a_day_and_thirty_days():
    assert [(one.step, one.size) for one in (LEVELS.fine, *LEVELS.stored)] == [
        (5, 720),
        (60, 1440),
        (3600, 720),
    ]


@pytest.mark.parametrize(
    ("period", "steps"),
    [(0, (5, 60, 3600)), (0.5, (5, 60, 3600)), (7.5, (8, 60, 3600)), (3600, (3600, 3600, 3600))],
)
def test_no_interval_is_shorter_than_the_time_between_two_samples(period, steps):
    found = levels(period)
    assert (found.fine.step, found.minutes.step, found.hours.step) == steps
    assert [one.name for one in found.stored] == [60, 3600]


@pytest.mark.parametrize(
    ("seconds", "step"),
    [(-1, 5), (0, 5), (3600.5, 5), (3606, 60), (86400.5, 60), (90000, 3600), (1e9, 3600)],
)
def test_the_finest_level_that_goes_back_so_far_is_chosen(seconds, step):
    assert LEVELS.covering(seconds).step == step


def test_a_sample_without_processors_has_no_point():
    assert FINE.point(sample(1.0, cpus=None)) is None


@given(MEASURED)
def test_the_points_of_an_interval_have_the_mean_and_the_maximum_of_its_samples(measured):
    level = LEVELS.hours
    points = [point(START + at % 3600, *more, level=level) for at, *more, _ in measured]
    found = points[0]
    for one in points[1:]:
        found = found.merged(one)
    memory, cpus = [one[1] for one in measured], [one[2] for one in measured]
    assert found.samples == len(measured)
    assert found.memory == pytest.approx(fmean(memory))
    assert found.cpus == pytest.approx(fmean(cpus))
    assert (found.memory_max, found.cpus_max) == (max(memory), max(cpus))
    assert min(memory) <= found.memory <= max(memory) or found.memory == pytest.approx(min(memory))


def test_the_newest_launch_and_the_most_kernels_of_an_interval_are_kept():
    one, other = point(START, generation=2), point(START + 1, generation=3, kernels=4)
    assert (one.kernels, other.kernels) == (UNKNOWN, 4)
    for merged in (one.merged(other), other.merged(one)):
        assert (merged.generation, merged.kernels) == (3, 4)


@given(MEASURED, st.integers(1, 20))
def test_a_series_is_bounded_and_in_order_however_the_clock_jumps(measured, size):
    """The last sample is always in it, and points are equal to what was measured."""
    series = Series(size)
    for at, memory, cpus, kernels in measured:
        series.add(point(START + at, memory, cpus, kernels=kernels))
        starts = [one.at for one in series]
        assert len(series) == len(starts) <= size
        assert starts == sorted(set(starts))
        assert starts[-1] == FINE.start(START + at)
    memories = [one[1] for one in measured]
    for one in series:
        assert min(memories) * (1 - 1e-6) <= one.memory <= max(memories) * (1 + 1e-6)
        assert 1 <= one.samples <= len(measured)


def test_a_series_keeps_memory_that_is_counted_in_pages_exactly():
    series = Series(3)
    amounts = [4096 * 3, 4096 * (2**24 - 1), 2**35 + 4096]
    for place, amount in enumerate(amounts):
        series.add(point(START + 5 * place, amount))
    assert [one.memory for one in series] == amounts


def test_a_tail_has_the_newest_points():
    series = Series(9)
    for place in range(5):
        series.add(point(START + 5 * place, place))
    assert [one.memory for one in series.tail(2)] == [3, 4]
    assert len(series.tail(50)) == 5
    assert series.tail(0) == []


def test_points_after_a_clock_that_was_set_back_are_dropped():
    series = Series(9)
    for at, memory in ((0, 1), (5, 2), (100, 3), (105, 4), (6, 8)):
        series.add(point(START + at, memory))
    assert [(one.at - START, one.memory) for one in series] == [(0, 1), (5, 5)]


def test_a_history_has_columns_with_gaps_and_begins_at_the_first_point():
    points = [
        point(START + 10, 100, 0.5, generation=1),
        point(START + 20, 300, 1.5, generation=2, kernels=3),
    ]
    found = history(points, FINE, since=START, until=START + 60)
    assert (found.since, found.until) == (START, START + 60)
    assert (found.resolution, found.start) == (5, START + 10)
    assert found.memory == found.memory_max == [100, None, 300]
    assert found.cpus == found.cpus_max == [0.5, None, 1.5]
    assert found.kernels == [None, None, 3]
    assert found.generation == [1, None, 2]


def test_a_history_without_points_is_empty():
    found = history([], FINE, since=START, until=START + 60)
    assert found.start == START
    assert found.memory == found.generation == ()


@given(MEASURED, st.floats(-1e12, 1e12), st.sampled_from([LEVELS.fine, *LEVELS.stored]))
def test_a_history_is_bounded_and_has_each_point_once(measured, since, level):
    """Also for a time long ago or ahead: what is returned was measured in the interval."""
    until = START + 20_000
    points = [point(START + at, m, c, level=level, kernels=k) for at, m, c, k in measured]
    found = history(points, level, since=since, until=until)
    columns = (
        found.memory,
        found.memory_max,
        found.cpus,
        found.cpus_max,
        found.kernels,
        found.generation,
    )
    assert {len(column) for column in columns} == {len(found.memory)}
    assert len(found.memory) <= level.size
    assert until - level.size * level.step <= found.since <= until
    starts = {one.at for one in points if level.start(found.since) <= one.at <= until}
    with_values = {
        found.start + place * level.step
        for place, value in enumerate(found.memory)
        if value is not None
    }
    assert with_values == starts


def test_points_of_another_length_are_merged_into_longer_intervals():
    """An earlier keeper measured more often."""
    level = levels(120).minutes
    points = [point(START + at, at, level=LEVELS.minutes) for at in (0, 60, 120)]
    found = history(points, level, since=START, until=START + 600)
    assert (found.resolution, found.memory, found.memory_max) == (120, [30, 120], [60, 120])


def test_recent_usage_ends_with_the_current_interval():
    points = [point(START + at, at, at / 100) for at in (0, 5, 15)]
    found = recent(points, FINE, count=4, now=START + 21)
    assert found.memory == [5, None, 15, None]
    assert found.cpus == [0.05, None, 0.15, None]


def test_recent_usage_leaves_out_what_is_not_of_its_intervals():
    points = [Point(START + 3, 1, 1, 1.0, 1.0, 1.0, 1.0, 0), point(START + 999)]
    assert recent(points, FINE, count=2, now=START + 4).memory == [None, None]

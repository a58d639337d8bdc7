"""What edges report, as keepers of other versions read it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkeeper.edge.report import Answers, Report, ReportError

REPORT = Report(1, 2, 3, 4, 5, Answers({("lab", "2xx"): 6}), [], 0, "k")


def test_report_is_read_as_it_was_written():
    assert Report.parse(REPORT.message()) == REPORT


def test_report_of_an_edge_of_another_version_is_read():
    """It finishes what it has begun: its connections would be cut if that were an error."""
    older = REPORT.message()
    del older["handshakes"]
    newer = REPORT.message() | {"another": 7}
    assert Report.parse(older) == replace(REPORT, handshakes=0)
    assert Report.parse(newer) == REPORT


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        REPORT.message() | {"held": "1"},
        REPORT.message() | {"answers": [["lab", 2, 6]]},
        REPORT.message() | {"answers": [["lab"]]},
    ],
)
def test_what_is_no_report_is_refused(bad):
    with pytest.raises(ReportError):
        Report.parse(bad)

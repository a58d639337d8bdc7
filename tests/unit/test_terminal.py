"""Foreign text is shown at a terminal without its control sequences taking effect."""

from __future__ import annotations

import pytest

from labkeeper.terminal import printable_line, visible, visible_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, wörds\tand 漢字\n", "plain, wörds\tand 漢字\n"),
        ("\x1b]52;c;cm0gLXJmIH4=\x07", r"\x1b]52;c;cm0gLXJmIH4=\x07"),
        ("\x1b[2J\x1b[1;1H", r"\x1b[2J\x1b[1;1H"),
        ("\x9b2J\x90q\x7f\x00\x08", r"\x9b2J\x90q\x7f\x00\x08"),
        ("shown\rhidden\r\n", "shown\\x0dhidden\r\n"),
        ("\x1b[32m[I]\x1b[m text", "\x1b[32m[I]\x1b[m text"),
        ("\x1b[8mhidden\nnext\x1b[31m", "\x1b[8mhidden\x1b[0m\nnext\x1b[31m\x1b[0m"),
        ("\x1b[" + "1;" * 40 + "m", r"\x1b[" + "1;" * 40 + "m"),
        ("\x1b[?25l", r"\x1b[?25l"),
    ],
)
def test_colours_are_kept_and_other_control_sequences_escaped(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


def test_visible_line_returns_a_single_line():
    assert visible_line("a\n\tb\r\nc\x1b[2J") == r"a\x0a\x09b\x0d\x0ac\x1b[2J"


def test_printable_line_escapes_colours_and_marks_of_direction_as_well():
    assert printable_line("wörds and 漢字") == "wörds and 漢字"
    assert printable_line("\x1b[31mred\n\x9b\u202egnp") == r"\x1b[31mred\x0a\x9b\u202egnp"

"""`labkeeper top` at a terminal, with a real keeper that is killed and comes back."""

from __future__ import annotations

from harness import until
from terminals import Terminal


def test_top_shows_usage_and_survives_the_keeper(make_keeper):
    """It finds the next keeper by the state directory, and takes its terminal's new size."""
    keeper = make_keeper(usage_period=0.5)
    keeper.start()
    keeper.post(name="demo")
    command = keeper.command("top", "--interval", "0.5")
    with Terminal(command, env=keeper.environment) as terminal:
        terminal.shows(r"^1 server: 1 running +\d\.\d\d CPUs, \d+ MiB")
        terminal.shows(r"^demo +running +.* \d\.\d\d +\d+ MiB +0 +0 ")
        keeper.kill()
        terminal.shows(r"^values of \d+ s ago: cannot ")
        terminal.shows("^demo +running")
        keeper.start()
        until(lambda: not terminal.screen()[1].strip(), what="the problem to be over")
        terminal.shows("^demo +running")
        terminal.resize(60, 5)
        until(
            lambda: {len(line) for line in terminal.screen()[:5]} == {60},
            what="a redraw to the new width",
        )
        terminal.press("q")
        assert terminal.ended() == 0
        assert terminal.is_restored()
    listed = keeper.cli("top")
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [
        ["NAME", "STATE"],
        ["demo", "running"],
    ]
    assert "\x1b" not in listed.stdout

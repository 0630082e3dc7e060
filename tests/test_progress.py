import io

import pytest
from rich.console import Console

from backdoor_gym import progress, repair


class Terminal(Console):
    """A terminal whose screen is kept."""

    screen = io.StringIO()

    def __init__(self, **_):
        super().__init__(file=Terminal.screen, force_terminal=True, width=80)


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(Terminal, "screen", io.StringIO())
    monkeypatch.setattr(progress, "Console", Terminal)
    return lambda: Terminal.screen.getvalue()


def test_a_bar_shows_what_is_done_and_of_how_much(screen):
    with progress.watched("reading", True) as watch:
        watch("scoring", 30, 40)
        watch("scoring", 40, 40)
    assert "40/40" in screen()
    assert list(progress.bar(range(3), "examples", 3, True)) == [0, 1, 2]
    assert "examples" in screen()


def test_a_bar_that_is_not_wanted_is_not_drawn(screen):
    with progress.watched("reading", False) as watch:
        watch("scoring", 40, 40)
    assert list(progress.bar(range(3), "examples", 3, False)) == [0, 1, 2]
    assert screen() == ""


def test_nothing_is_left_where_there_is_no_terminal(capsys):
    with progress.watched("reading", True) as watch:
        watch("scoring", 40, 40)
    assert capsys.readouterr() == ("", "")


def test_a_repair_tells_how_far_it_is(infected):
    seen = []
    result = repair(infected, "clp", u=1.5, watch=lambda *now: seen.append(now))
    assert list(dict.fromkeys(what for what, *_ in seen)) == [
        "reading the neurons", "pruning: steps", "scoring before", "scoring after",
    ]  # fmt: skip
    answers = [(done, total) for what, done, total in seen if what == "scoring after"]
    assert answers[0][0] == min(500, len(infected.test))  # a batch
    assert answers[-1][0] <= answers[-1][1] == 2 * len(infected.test)
    assert [done for what, done, _ in seen if what == "pruning: steps"][-1] >= len(result.pruned)

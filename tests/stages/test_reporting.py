"""What a person sees while stages run."""

import io

import pytest
from rich.console import Console

from sslrun.stages import reporting
from sslrun.stages.reporting import Reporter

NAME = "a-recipe-of-a-long-name · resnet18 · pretrain rotation · seed 0"


def drawn(width):
    """The two bars of a sweep as they stand on a terminal of so many columns."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    reporter = Reporter(console)
    with reporter.plan("few", 5) as advance, reporter.stage(NAME, 1080, unit="images") as update:
        advance()
        update(540, 0.387, 1735.4)
        paper = Console(file=io.StringIO(), width=width)
        paper.print(reporter.progress.get_renderable())
    return paper.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_bars_show_stage_loss_speed_and_time_left_on_any_terminal(width):
    plan, stage = drawn(width)
    assert "1/5" in plan
    for words in ("a-recipe-of-a-long-name", "540/1080", "loss 0.387 · 1,735 images/s", "left", "━"):
        assert words in stage
    assert len(stage) <= width


def test_where_there_is_no_terminal_a_line_is_said_now_and_then(monkeypatch):
    console = Console(file=io.StringIO(), width=300)
    reporter = Reporter(console)
    with reporter.plan("few", 4) as advance, reporter.stage("mine", 10, unit="images") as update:
        update(1, 2.0, 100.0)
        advance()
        monkeypatch.setattr(reporting, "PLAIN_SECONDS", 0.0)
        update(5, 1.0, 2000.0)
        advance()
    assert console.file.getvalue() == "mine: step 5/10 · loss 1.000 · 2,000 images/s\nfew: 2/4 runs\n"


def test_a_process_that_is_not_the_first_says_nothing(capsys):
    Reporter(quiet=True).say("a word")
    assert capsys.readouterr().err == ""


def test_the_reading_of_a_data_set_is_shown(monkeypatch):
    monkeypatch.setattr(reporting, "PLAIN_SECONDS", 0.0)
    plain = Console(file=io.StringIO(), width=300)
    with Reporter(plain).reading() as progress:
        progress("books.txt", 1200, 0)
        progress("cats", 5, 10)
    assert plain.file.getvalue() == "books.txt: 1,200 read\ncats: 5 of 10 read\n"
    reporter = Reporter(Console(file=io.StringIO(), force_terminal=True, width=100))
    with reporter.reading() as progress:
        progress("books.txt", 1200, 0)
        paper = Console(file=io.StringIO(), width=100)
        paper.print(reporter.progress.get_renderable())
        assert "1200/?" in paper.file.getvalue()
    assert not reporter.progress.tasks
    assert not reporter.progress.live.is_started

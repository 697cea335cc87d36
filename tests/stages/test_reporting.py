"""Progress reports: bars, lines and the time left."""

import io
import time

import pytest
from rich.console import Console

from sslrun.runs import Run
from sslrun.stages import reporting
from sslrun.stages.reporting import Pace, Reporter

NAME = "a-recipe-of-a-long-name · resnet18 · pretrain rotation · seed 0"


@pytest.fixture
def runs(tmp_path):
    """Return five runs: two pretraining runs and three probes."""
    stages = ["pretrain", "pretrain", "probe", "probe", "probe"]
    return [Run(tmp_path, "few", stage, {"at": number}) for number, stage in enumerate(stages)]


def finish(run, seconds):
    run.path.mkdir(parents=True)
    run.finish({"seconds": seconds})


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_bars_show_stage_loss_speed_and_time_left_on_any_terminal(width, runs):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    reporter = Reporter(console)
    finish(runs[0], 100.0)
    with reporter.plan("few", runs) as settle, reporter.stage(NAME, 1080, unit="images") as update:
        settle(runs[0])
        update(540, 0.387, 1735.4)
        paper = Console(file=io.StringIO(), width=width)
        paper.print(reporter.progress.get_renderable())
    plan, stage = paper.file.getvalue().splitlines()
    assert "1/5 runs" in plan
    assert "> 1:40 left" in plan
    for words in (
        "a-recipe-of-a-long-name",
        "540/1080",
        "loss 0.387 · 1,735 images/s",
        "left",
        "━",
    ):
        assert words in stage
    assert len(stage) <= width
    assert not reporter.progress.tasks
    assert not reporter.progress.live.is_started


@pytest.fixture
def plain(monkeypatch):
    """Return a reporter without a terminal that prints at every tick, and its output."""
    monkeypatch.setattr(reporting, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(reporting, "TICK_SECONDS", 0.02)
    console = Console(file=io.StringIO(), width=300)
    return Reporter(console), lambda: console.file.getvalue()


def test_a_line_comes_within_ten_seconds():
    assert reporting.PLAIN_SECONDS + reporting.TICK_SECONDS <= 10


def test_without_a_terminal_one_line_shows_everything(plain, runs):
    reporter, printed = plain
    finish(runs[0], 100.0)
    with reporter.plan("few", runs) as settle, reporter.stage("mine", 10, unit="images") as update:
        settle(runs[0])
        update(5, 1.0, 2000.0)
        wait_for(lambda: "loss 1.000" in printed())
    line = next(line for line in printed().splitlines() if "loss 1.000" in line)
    assert line.startswith("few: 1/5 runs · ")
    assert line.endswith("left · mine · step 5/10 · loss 1.000 · 2,000 images/s")


def test_a_job_without_steps_prints_lines_too(plain):
    reporter, printed = plain
    with (
        reporter.job("digits 1 · resnet18 · knn · seed 0"),
        reporter.job("another name for the same"),
    ):
        wait_for(lambda: printed().count("\n") >= 2)
    assert set(printed().splitlines()) <= {
        f"digits 1 · resnet18 · knn · seed 0 · running for {s} s" for s in range(20)
    }
    length = len(printed())
    time.sleep(0.1)
    assert len(printed()) == length  # nothing is printed while nothing runs


def test_a_computing_thread_does_not_block_the_reports(plain):
    import torch

    reporter, printed = plain
    with reporter.job("a job"):
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            torch.ones(300, 300) @ torch.ones(300, 300)
    assert printed().count("\n") >= 2


def test_runs_that_others_finish_are_counted(plain, runs):
    reporter, printed = plain
    with reporter.plan("few", runs, workers=2), reporter.job("mine"):
        wait_for(lambda: "few: 0/5 runs" in printed())
        finish(runs[3], 10.0)
        finish(runs[4], 10.0)
        wait_for(lambda: "few: 2/5 runs" in printed())


def test_the_time_left_follows_finished_runs_of_the_same_stage(runs):
    pace = Pace(runs, workers=2)
    assert pace.left(None) == (None, False)
    assert pace.share(None) == 0.0
    finish(runs[0], 100.0)
    pace.update()
    assert pace.left(None) == (100 / 2, False)  # no probe has run yet
    finish(runs[2], 10.0)
    pace.update()
    left, whole = pace.left(None)
    assert (left, whole) == ((100 + 10 + 10) / 2, True)
    assert pace.share(left) == pytest.approx(110 / 230)
    pace.settle(runs[1])  # it failed
    assert pace.left(None) == ((10 + 10) / 2, True)


def test_the_time_left_follows_the_steps_of_current_runs(runs, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now)
    job = reporting._Job("first", "pretrain")
    job.stage = reporting._Stage("first", total=100, done=40)  # resumed after step 40
    now += 30
    assert job.stage.left is None
    job.stage.done = 60
    assert job.stage.left == 60.0
    assert Pace(runs).left(job) == (
        2 * (30 + 60) - 30,
        False,
    )  # two pretraining runs; no probe has run yet
    assert reporting._left(*Pace(runs).left(job)) == "over 2 min 30 s left"


def test_only_the_first_process_reports(capsys):
    reporter = Reporter(quiet=True)
    reporter.say("a word")
    with reporter.job("quiet"):
        assert reporter._ticker is None
    assert capsys.readouterr().err == ""


def test_reading_a_data_set_is_reported(plain):
    reporter, printed = plain
    with reporter.reading() as progress:
        progress("books.txt", 1200, 0)
        wait_for(lambda: "books.txt: 1,200 read\n" in printed())
        progress("cats", 5, 10)
        wait_for(lambda: "cats: 5 of 10 read\n" in printed())
    drawn = Reporter(Console(file=io.StringIO(), force_terminal=True, width=100))
    with drawn.reading() as progress:
        progress("books.txt", 1200, 0)
        paper = Console(file=io.StringIO(), width=100)
        paper.print(drawn.progress.get_renderable())
        assert "1,200/?" in paper.file.getvalue()
    assert not drawn.progress.tasks
    assert not drawn.progress.live.is_started


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.4, "4 s"), (75, "1 min 15 s"), (7260, "2 h 01 min")]
)
def test_durations(seconds, words):
    assert reporting.format_duration(seconds) == words

"""Signals: a second interrupt ends the process at once."""

import signal

import pytest

from sslrun.stages import context
from sslrun.stages.context import Interrupted, Stop


def test_a_second_interrupt_ends_at_once_and_a_second_termination_does_not(monkeypatch):
    stop, clock = Stop(), iter([10.0, 13.0])
    monkeypatch.setattr(context.time, "monotonic", lambda: next(clock))
    stop.check()
    stop._received(signal.SIGINT, None)
    stop._received(
        signal.SIGTERM, None
    )  # the first worker of a sweep ends the others after it has saved
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        stop.check()
    with pytest.raises(KeyboardInterrupt):
        stop._received(signal.SIGINT, None)


def test_a_forwarded_interrupt_does_not_count_as_a_second_one(monkeypatch):
    stop, clock = Stop(), iter([10.0, 11.0])
    monkeypatch.setattr(context.time, "monotonic", lambda: next(clock))
    stop._received(signal.SIGINT, None)
    stop._received(signal.SIGINT, None)
    assert stop.due

"""Signals, and the data that runs were computed from."""

import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial

import pytest

from sslrun.cli import run as run_module
from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.launch.timelimit import NOTICE, time_limit
from sslrun.launch.torchrun import ERROR_FILE
from sslrun.protocols.classical import answering_signals
from sslrun.recipe import Named
from sslrun.runs import WORKER, Run, hash_contents
from sslrun.stages import context
from sslrun.stages.context import Context, Interrupted, Stop, perform
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute

SIGNALS = signal.SIGINT, signal.SIGTERM


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


def test_a_signal_ends_a_fit_in_c_code(monkeypatch):
    """The main thread answers while another one is in C code, here the wait for an event."""
    stop, blocked = Stop(), threading.Event()
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, NOTICE)}
    stop.listen()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(KeyboardInterrupt), stop.unsaved():
            answering_signals(partial(blocked.wait, 60))
    finally:
        blocked.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert answering_signals(lambda: 1) == 1
    with pytest.raises(ValueError, match="of the fit"):
        answering_signals(partial(fail, ValueError("of the fit")))


def fail(error):
    raise error


@pytest.mark.parametrize("error", [None, ValueError("of a library")])
def test_a_signal_is_not_lost_in_a_library_that_swallows_it(error):
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.unsaved():
        with suppress(KeyboardInterrupt):
            stop._received(signal.SIGTERM, None)
        if error is not None:
            raise error

"""Being stopped: the first signal ends the command in order, and impatience does no harm."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0  # seconds in which a second signal is ignored: workers are being ended
AGAIN = 6.0  # seconds, more than GRACE
PATIENCE = 5.0  # seconds for what has to be undone at the end

_last = -math.inf  # when a signal raised KeyboardInterrupt


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """The whole program: Ctrl-C, a termination or a lost terminal raise KeyboardInterrupt in it.

    What was ignored when it was started (by nohup) stays so. Python drops an exception that comes
    while it cleans up after an object, so an alarm raises it again until the block ends. After the
    block, all are ignored: the interpreter is ending and would answer with a traceback.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        global _last
        if time.monotonic() - _last >= GRACE:
            _last = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            raise KeyboardInterrupt

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    signal.signal(signal.SIGALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def just_stopped() -> bool:
    """Whether a signal came a moment ago: libraries turn its exception into errors of theirs."""
    return time.monotonic() - _last < AGAIN


def end_now(status: int) -> NoReturn:
    """End this process without taking the interpreter apart.

    Threads that decode audio or compute may still be at work in C code, on memory that an orderly
    end would free; and those of killed workers may wait for each other for ever.
    """
    end = threading.Timer(PATIENCE, os._exit, [status])
    end.daemon = True
    end.start()
    if "multiprocessing.util" in sys.modules:  # semaphores are named files
        sys.modules["multiprocessing.util"]._exit_function()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started in the block are deaf to these signals; this one hears them after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

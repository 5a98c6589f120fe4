"""Being stopped: the first signal ends the command in order, and impatience does no harm."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0  # seconds in which a second signal is ignored: workers are being ended
AGAIN = 6.0  # seconds, more than GRACE


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """The whole program: Ctrl-C, a termination or a lost terminal raise KeyboardInterrupt in it.

    What was ignored when it was started (by nohup) stays so. Python drops an exception that comes
    while it cleans up after an object, so an alarm raises it again until the block ends. After the
    block, all are ignored: the interpreter is ending and would answer with a traceback.
    """
    last = -GRACE

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last >= GRACE:
            last = time.monotonic()
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


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started in the block are deaf to these signals; this one hears them after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

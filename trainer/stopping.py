"""Signals that ask a run to end: noted, agreed on by all processes, obeyed between two batches."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

# A cluster's scheduler sends SIGTERM or SIGUSR1 some time before it kills, a closed terminal SIGHUP, Ctrl-C SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Seconds in which further signals are the same request, by another way: of a scheduler to all, and of a launcher
ECHO = 2.0


_current: "Stop | None" = None  # the one that signals go to


def listens() -> bool:
    """Whether a signal would be noted, and a checkpoint saved."""
    return _current is not None


def request(number: int) -> None:
    """Ask this process to end, as a signal does; where it was asked before, nothing more."""
    if _current is None or not _current.asked:
        os.kill(os.getpid(), number)


class Stopped(KeyboardInterrupt):
    """The run was asked to end. ``code`` of the process: 0 where it is to be run again, 130 of Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 130 if number == signal.SIGINT else 0


class Stop:
    """Within ``with stop:`` a first signal asks for an end, a second one, some seconds later, ends the process at once.

    Attributes:
        asked: the signal, 0: none so far.
    """

    def __init__(self) -> None:
        self.asked, self.since = 0, 0.0
        self.deferred = False

    def __enter__(self) -> "Stop":
        global _current
        self.before, _current = {}, self
        if threading.current_thread() is threading.main_thread():
            # What is ignored from outside stays so: nohup means that a closed terminal is no reason to end
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def between_batches(self) -> Iterator[None]:
        """Within the block a signal is only noted: who takes batches asks for it between them."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.since < ECHO:
            return
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked, self.since = number, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            then = "stopping after this batch" if self.deferred else "stopping"
            # What is being printed may be cut by the signal: this goes past Python's buffers
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{signal.Signals(number).name}: {then}\n".encode()
            )
        if not self.deferred:
            raise Stopped(number)

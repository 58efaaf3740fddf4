"""SIGTERM, SIGINT and SIGUSR1: at once, or where a step is under way, at its end.

listen()
with deferred() as pending:
...                                # A signal only sets `pending.number`; a second SIGINT still acts at once.
raise interrupt(pending.number)    # When what is to be kept is kept.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGUSR1 ahead of a pre-emption; handled like Ctrl-C, with another exit code."""


@dataclass
class Pending:
    """What came while it was put off."""

    number: int | None = None


NOTHING = Pending()
"""Where signals do not wait."""

_innermost: Pending | None = None


def listen() -> None:
    """From now on the signals raise `interrupt` in the main thread, or wait where a block puts them off."""
    for number in SIGNALS:
        signal.signal(number, _received)


@contextmanager
def deferred() -> Iterator[Pending]:
    """Signals wait for the length of a block; what becomes of them is its affair."""
    global _innermost
    outer, _innermost = _innermost, Pending()
    try:
        yield _innermost
    finally:
        _innermost = outer


def interrupt(number: int) -> KeyboardInterrupt:
    """What a signal raises."""
    name = signal.Signals(number).name
    return KeyboardInterrupt(name) if number == signal.SIGINT else Terminated(name)


def _received(number: int, frame: FrameType | None) -> None:
    waiting = _innermost
    if waiting is None or (number == signal.SIGINT == waiting.number):
        raise interrupt(number)
    waiting.number = waiting.number or number

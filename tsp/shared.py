"""What jobs on one model share in a sweep: the loaded model, and what was measured of it, each thing once.

    watch, shared = Stopwatch(), Shared()
    dense = shared.once(("dense", corpora), watch, "evaluate", lambda: evaluate(...))

A job that finds a thing done is charged the seconds that it took, so that jobs can be compared as if each ran alone.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    """Phases of which an earlier job did a part."""
    paid: set[Hashable] = field(default_factory=set)
    """Keys of `Shared` that this job was charged for."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(phase, time.perf_counter() - started)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


@dataclass
class Shared:
    """Things by key, with the seconds each took; a job that asks again pays once."""

    more_to_come: bool = False
    """Another job follows: this one has to leave the model as it found it."""
    _things: dict[Hashable, tuple[Any, float]] = field(default_factory=dict)

    def once(self, key: Hashable, watch: Stopwatch, phase: str, make: Callable[[], Value]) -> Value:
        """What `make` returns, or returned when an earlier job asked for the same key.

        Args:
            key: all that the value depends on, beside the model.
            watch: is charged the seconds, whoever spent them.
            phase: that they belong to.
            make: called the same on every rank.
        """
        if key in watch.paid:
            return self._things[key][0]
        if key in self._things:
            watch.shared.add(phase)
        else:
            started = time.perf_counter()
            value = make()
            self._things[key] = (value, time.perf_counter() - started)
        value, seconds = self._things[key]
        watch.add(phase, seconds)
        watch.paid.add(key)
        return value

    def forget(self, key: Hashable) -> None:
        """The next that asks for it makes it anew."""
        self._things.pop(key, None)

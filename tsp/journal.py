"""The journal: what a job has measured, kept on disk, so that a job that goes on need not measure it again.

    journal = Journal.open(output / "state" / "journal.jsonl", engine, lambda: job.hash)
    losses = journal.once({"gone": [3], "candidates": [4, 5]}, lambda: measure())

A job is deterministic: one that is started again takes the same measurements in the same order. The n-th question is
therefore answered by the n-th line, if that line is the answer to just this question of just this job; from the first
that is not (on another number of ranks another layer may be the best) all is measured again, and the old lines give way
to the new. What is asked in the middle of a measurement is a part of it, and has no line of its own.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tsp.engine import Engine

log = logging.getLogger("tsp")


class Journal:
    """Answers by their order. Every rank knows all of them; rank 0 alone writes."""

    def __init__(self, job: str = "", entries: Sequence[Mapping[str, Any]] = (), path: Path | None = None) -> None:
        """Made by `open`; without arguments a journal that knows nothing and keeps nothing.

        Args:
            job: a part of every question.
            entries: `question` (16 hex digits), `values` and `seconds` of each line.
            path: file; None off rank 0.
        """
        self.job = job
        self._entries = list(entries)
        self._path = path
        self._next = 0
        self._measuring = False
        self.known_s = 0.0
        """Seconds that runs before took for what they have answered since."""

    @classmethod
    def open(cls, path: Path, engine: "Engine", job: Callable[[], str]) -> "Journal":
        """Read the file, if there is one; the same call on every rank.

        Args:
            path: file, made with the first measurement.
            engine: tells the other ranks what rank 0 has read.
            job: gives the hash of the job; called on rank 0, whose copy of the model files is the one that counts.

        Raises:
            OSError: it cannot be read.
        """
        hashed, entries = engine.on_first(lambda: (job(), _read(path)))
        if entries and engine.is_first:
            log.info("journal: %d measurements of the run before are known", len(entries))
        return cls(hashed, entries, path if engine.is_first else None)

    def once(self, question: Mapping[str, Any], measure: Callable[[], list[float]]) -> list[float]:
        """What was answered the last time, or else what `measure` returns.

        Args:
            question: all that the answer depends on and that is not known from the order; JSON.
            measure: called the same on every rank, and the same on every rank is what it returns.
        """
        if self._measuring:
            return measure()
        digest = hashlib.sha256(json.dumps([self.job, question], sort_keys=True).encode()).hexdigest()[:16]
        if self._next < len(self._entries):
            if self._entries[self._next]["question"] == digest:
                entry = self._entries[self._next]
                self._next += 1
                self.known_s += entry.get("seconds", 0.0)  # Lines of an earlier version have none.
                return list(entry["values"])
            self._forget_the_rest()
        started, self._measuring = time.perf_counter(), True
        try:
            values = measure()
        finally:
            self._measuring = False
        seconds = round(time.perf_counter() - started, 3)
        self._entries.append({"question": digest, "values": values, "seconds": seconds})
        self._next += 1
        if self._path is not None:
            try:
                _append(self._path, self._entries[-1])
            except OSError as error:
                self._go_on_without(error)
        return values

    def _forget_the_rest(self) -> None:
        """This time something else is asked."""
        del self._entries[self._next :]
        if self._path is not None:
            log.warning("journal: question %d is another than in the run before; measured from here on", self._next)
            temporary = self._path.with_suffix(".tmp")
            try:
                temporary.unlink(missing_ok=True)
                for entry in self._entries:
                    _append(temporary, entry)
                temporary.touch()
                os.replace(temporary, self._path)
            except OSError as error:
                self._go_on_without(error)

    def _go_on_without(self, error: OSError) -> None:
        log.warning("journal: %s cannot be written (%s); the job goes on without it", self._path, error)
        self._path = None


def digest_of(blocks_NT: Tensor) -> str:
    """16 hex digits of tokens `[N, T]` int64."""
    return hashlib.sha256(blocks_NT.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    """One line, with its check sum, that is on disk when this returns."""
    text = json.dumps(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first damaged one, which is cut off with all behind it."""
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = []
    content = path.read_bytes()
    good = 0
    for line in content.splitlines(keepends=True):
        check, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or check != b"%08x" % zlib.crc32(text[:-1]):
            break
        entries.append(json.loads(text))
        good += len(line)
    if good < len(content):
        log.warning("journal: %s is damaged behind line %d; measured from there on", path, len(entries))
        with path.open("rb+") as file:
            file.truncate(good)
            os.fsync(file.fileno())
    return entries

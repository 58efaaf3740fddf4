"""The file behind a spool: one JSON document a line, one process at a time, and what it holds is what is still owed.

    file = SpoolFile(folder, run_id)
    file.open({"run_id": run_id, "uri": uri, "owns_run": True}, wait_s=0)
    file.append(record)
    file.send(client)
    file.remove()

No threads, no clocks and no retries here; `spool.py` has them.
"""

import errno
import json
import logging
import os
import shutil
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

from filelock import FileLock

from tsp.tracking.delivery import Record, deliver

log = logging.getLogger(__name__)


class SpoolFile:
    """The file of one run, locked for one process: header, records, and the folder of the files they name."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.run_id = run_id
        self.path = folder / f"{run_id}.jsonl"
        self.files = folder / run_id
        self._lock = FileLock(folder / f"{run_id}.lock", thread_local=False)
        self._write_lock = threading.RLock()
        self._fd = -1
        self._start = self._sent = 0
        self._ended = False
        self._waiting: deque[bytes] = deque()
        self.num_sent = 0

    def open(self, header: Record | None, *, wait_s: float) -> Record:
        """Lock the file, write `header` if it is new, and return the header that stands in it.

        Raises:
            Timeout: another process writes it.
            FileNotFoundError: there is none, and `header` is None.
        """
        self._lock.acquire(timeout=wait_s)
        try:
            create = os.O_CREAT if header is not None else 0
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | create, 0o644)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                os.write(
                    self._fd, b"\n"
                )  # The last writer died within a line: end it, so that ours is not joined to it.
            records = read_records(self.path, 0, max_bytes=1)
            if not records or records[0][0]["kind"] != "header":
                if header is None:
                    raise FileNotFoundError(self.path)
                os.ftruncate(self._fd, 0)
                self.append({"kind": "header", **header})
                records = read_records(self.path, 0, max_bytes=1)
        except BaseException:
            self.release()
            raise
        self._start = self._sent = records[0][1]
        return records[0][0]

    def append(self, record: Record) -> None:
        """Write one record, behind those that wait. One system call: a killed process leaves at most one torn line.

        Raises:
            OSError: the disk has no room; the record waits in memory for the next call, or for the last `send`.
        """
        with self._write_lock:
            self._waiting.append(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._fd).st_size
        if os.write(self._fd, line) < len(line):
            os.ftruncate(self._fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    @property
    def num_waiting(self) -> int:
        """Records for which there was no room on disk."""
        return len(self._waiting)

    def owed(self) -> list[Record]:
        """All records that are not acknowledged yet."""
        return [record for record, _ in read_records(self.path, self._sent, max_bytes=sys.maxsize)]

    def send(self, client: Any, *, last: bool = False) -> None:
        """Deliver all that stands in the file, and cut it off. Raises what `deliver` raises.

        A file that ends in a final status is not cut, only removed: without it the run would be taken for a lost one.

        Args:
            client: of MLflow.
            last: nobody appends any more; what waits in memory is delivered, too.
        """
        while batch := read_records(self.path, self._sent):
            records = [record for record, _ in batch]
            deliver(client, self.run_id, records, self.files)
            self.num_sent += len(batch)
            self._sent = batch[-1][1]
            self._ended = is_ended(records, self._ended)
        with self._write_lock:
            if not self._ended and os.fstat(self._fd).st_size == self._sent:
                os.ftruncate(self._fd, self._start)
                self._sent = self._start
        if last and self._waiting:
            deliver(client, self.run_id, [json.loads(line) for line in self._waiting], self.files)
            self._waiting.clear()

    def release(self) -> None:
        """Let go of the file; another process may have it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.release()

    def remove(self) -> None:
        """Delete the file and what belongs to it; nothing is owed any more."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.files, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self.release()


def read_records(path: Path, offset: int, max_bytes: int = 1 << 20) -> list[tuple[Record, int]]:
    """Records of a spool file from a position on.

    Args:
        path: spool file, one JSON document a line.
        offset: position in bytes, at the beginning of a line.
        max_bytes: stop reading after the line that reaches this many bytes.

    Returns:
        Each record with the position behind it. A last line without an end (the writer died in it, or is writing it
        now) is not there; a damaged line inside the file is left out with a warning.
    """
    records: list[tuple[Record, int]] = []
    with path.open("rb") as file:
        file.seek(offset)
        while file.tell() - offset < max_bytes:
            line = file.readline()
            if not line.endswith(b"\n"):
                break
            try:
                records.append((json.loads(line), file.tell()))
            except ValueError:
                log.warning("%s: a damaged line before byte %d is left out", path, file.tell())
                records.append(({"kind": "damaged"}, file.tell()))
    return records


def is_ended(records: list[Record], before: bool) -> bool:
    """Whether the run has a final status after these records, given whether it had one before."""
    statuses = [record["status"] for record in records if record["kind"] == "status"]
    return statuses[-1] != "RUNNING" if statuses else before

"""The spool: what a run wants logged goes to a file first, and from there to MLflow.

    spool = Spool(folder, run_id, uri, owns_run=True)
    spool.append({"kind": "metrics", "values": {"loss": 2.5}, "step": 7, "time_ms": now_ms()})
    spool.close(timeout_s=60)

The caller appends one line to `<folder>/<run_id>.jsonl` and goes on. A thread sends what stands in the file, in order
and in batches, and cuts off what MLflow has acknowledged: the file holds just what is still owed. An outage therefore
costs the caller nothing, and a crash loses nothing that was appended. `sync` delivers what earlier jobs had to leave
behind. While its writer lives, it holds the lock `<run_id>.lock`. What a record means is the affair of `delivery.py`.
"""

import logging
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from tsp.errors import TrackingError
from tsp.masking import MASK, masked
from tsp.tracking.delivery import Record
from tsp.tracking.spool_file import SpoolFile, is_ended
from tsp.tracking.store import open_store, resolve_uri, shown, spool_folder, sqlite_path

log = logging.getLogger(__name__)

SEND_INTERVAL_S = 0.5
MAX_PAUSE_S = 30.0
"""The sender looks for new records this often; in an outage it waits longer and longer, up to the second."""

PASSING_S = 6.0
"""How long `sync` waits for a spool that somebody has: a watcher lets go of it after each try."""

TAKEOVER_S = 30.0
"""How long a resumed run waits for the watcher of the killed one to let go of the spool."""


class Synced(NamedTuple):
    """What became of one spool."""

    run_id: str
    delivered: int
    left: int
    """Records delivered to MLflow, and records that are still in the spool."""


def now_ms() -> int:
    """Milliseconds since the epoch, MLflow's clock."""
    return time.time_ns() // 1_000_000


class Spool:
    """Writer and sender of one run's records."""

    def __init__(self, folder: Path, run_id: str, uri: str, *, owns_run: bool) -> None:
        """Open or continue the spool of a run.

        Args:
            folder: `mlruns/spool`.
            run_id: the run that all records are for.
            uri: tracking URI of its store.
            owns_run: whether a status is ours to set, also if this process disappears.

        Raises:
            TrackingError: another process is writing this run.
        """
        self._file = SpoolFile(folder, run_id)
        self._uri = uri
        try:
            self._file.open({"run_id": run_id, "uri": masked(uri), "owns_run": owns_run}, wait_s=TAKEOVER_S)
        except Timeout as error:
            raise TrackingError(f"run {run_id} is being written by another process; wait for its end") from error
        self._closing = threading.Event()
        self._deadline = 0.0
        self._delivered = False
        self._failing = False
        self._open = True
        self._num_files = 0
        self._thread = threading.Thread(target=self._run, name="tsp-tracking", daemon=True)
        self._thread.start()

    def append(self, record: Record) -> None:
        """Queue one record for MLflow. Never raises for reasons of MLflow or the disk; does nothing after `close`."""
        if not self._open:
            return
        try:
            self._file.append(record)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("tracking: %s cannot be written (%s); records wait in memory", self._file.path, error)
            self._failing = True

    def place(self, name: str) -> Path:
        """A fresh path in the spool for a file called `name`, which a record may then name relative to `files`."""
        self._num_files += 1
        folder = self._file.files / f"{now_ms()}-{self._num_files}"
        folder.mkdir(parents=True)
        return folder / name

    def owed(self) -> list[Record]:
        """What MLflow has not acknowledged yet."""
        return self._file.owed()

    @property
    def files(self) -> Path:
        """Folder of the files that wait for delivery."""
        return self._file.files

    def close(self, timeout_s: float) -> bool:
        """Deliver what is left, for at most so long, and end the sender.

        Args:
            timeout_s: seconds.

        Returns:
            Whether all was delivered. If not, the spool stays where it is, and one line on stderr says so.
        """
        self._open = False
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 1)  # A sender that is stuck in a request longer than that dies with the process.
        if not self._delivered:
            print(  # It must reach the user whatever the logging is set to.
                f"tracking: MLflow at {shown(self._uri)} did not take all records in time; they are kept in "
                f"{self._file.path}, and `tsp sync` delivers them{self._lost()}",
                file=sys.stderr,
            )
        return self._delivered

    def _lost(self) -> str:
        return f"; {number} for which the disk had no room are lost" if (number := self._file.num_waiting) else ""

    def _run(self) -> None:
        """The sender thread."""
        client, pause_s = None, SEND_INTERVAL_S
        while True:
            closing = self._closing.wait(pause_s)
            try:
                if client is None:
                    from mlflow import MlflowClient

                    client = MlflowClient(self._uri)
                self._file.send(client, last=closing)
            except Exception as error:  # noqa: BLE001  Whatever MLflow throws, training goes on, and the records are kept.
                if pause_s == SEND_INTERVAL_S:
                    log.warning(
                        "tracking: MLflow fails (%s); the job goes on, records wait on disk", _first_line(error)
                    )
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                if closing:
                    left_s = self._deadline - time.monotonic()
                    if left_s <= 0:
                        self._file.release()
                        return
                    time.sleep(min(pause_s, 2.0, left_s))
                continue
            if pause_s != SEND_INTERVAL_S:
                log.warning("tracking: MLflow answers again")
                pause_s = SEND_INTERVAL_S
            if closing:
                self._file.remove()
                self._delivered = True
                return


def recover(folder: Path, run_id: str, *, wait_s: float = 0) -> Synced | None:
    """Deliver a spool whose writer is gone.

    A run of ours without a status is one whose process disappeared: it ends KILLED, at its last sign of life.

    Args:
        folder: `mlruns/spool`.
        run_id: the run.
        wait_s: for whoever has the spool now.

    Returns:
        What became of it; None where its writer is alive or nothing is left to deliver.
    """
    file = SpoolFile(folder, run_id)
    try:
        end_ms = file.path.stat().st_mtime_ns // 1_000_000
        header = file.open(None, wait_s=wait_s)
    except (Timeout, FileNotFoundError):
        return None
    from mlflow import MlflowClient

    if header["owns_run"] and not is_ended(file.owed(), False):
        file.append({"kind": "tags", "values": {"tsp.failure": "the process disappeared"}})
        file.append({"kind": "status", "status": "KILLED", "time_ms": end_ms})
    try:
        store = _find_store(header["uri"], folder)
        open_store(store, folder.parent.parent)  # A server that is away is known at once.
        file.send(MlflowClient(store))
    except Exception as error:  # noqa: BLE001  The spool stays, and the caller is told how much is left.
        log.warning("tracking: run %s is not delivered: %s", run_id, _first_line(error))
    left = len(file.owed())
    if left:
        file.release()
    else:
        file.remove()
    return Synced(run_id, file.num_sent, left)


def sync(root: Path) -> list[Synced]:
    """Deliver what the jobs of a working directory have left in their spools; those still running are skipped.

    A watcher has a spool for moments, a job as long as it lives.

    Args:
        root: working directory, the folder that holds `mlruns/`.

    Returns:
        One entry a spool that was touched.
    """
    folder = spool_folder(root)
    found = [recover(folder, path.stem, wait_s=PASSING_S) for path in sorted(folder.glob("*.jsonl"))]
    return [synced for synced in found if synced is not None]


def held_by_others(root: Path, synced: Sequence[Synced]) -> list[str]:
    """The runs whose spools `sync` has found in use."""
    touched = {one.run_id for one in synced}
    return [path.stem for path in sorted(spool_folder(root).glob("*.jsonl")) if path.stem not in touched]


def _find_store(uri: str, folder: Path) -> str:
    """The store of a spool. If its sqlite file is gone, the folder was moved: the one beside the spool is meant.

    The credentials of a server are in nobody's file: they come from the environment.

    Raises:
        TrackingError: there is none; MLflow would make an empty one. Or the environment names another server.
    """
    if MASK in uri:
        given = resolve_uri(folder.parent.parent)
        if masked(given) != uri:
            raise TrackingError(f"set MLFLOW_TRACKING_URI to {uri} with its credentials")
        return given
    path = sqlite_path(uri)
    if path is None or path.exists():
        return uri
    beside = folder.parent / path.name
    if not beside.exists():
        raise TrackingError(f"the tracking database {path} is gone")
    return f"sqlite:///{beside}"


def _first_line(error: Exception) -> str:
    return masked(str(error)).partition("\n")[0][:300]

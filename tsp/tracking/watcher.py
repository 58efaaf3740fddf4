"""A small process that outlives the job and sees to it that a run does not stay RUNNING for ever.

    python -m tsp.tracking.watcher RUN_ID SPOOL_FOLDER     with a pipe as stdin

While the job lives it sleeps in `read`: no CPU, no mlflow, a few megabytes. When the pipe ends, because the job closed
it or because the job is gone, the last word tells which. If it is not `closed`, the watcher delivers the spool and
marks a run without a status KILLED. SIGKILL of the job, lack of memory and a crash in a library are thus recorded like
any other end.

At its start it has what earlier jobs of the folder have left behind delivered, so that `tsp sync` is seldom needed.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

CLOSED = b"closed"
PATIENCE_S = 600
PAUSE_S = 5
"""In an outage the watcher tries so long, with such pauses; then it leaves the rest to `tsp sync`."""


class Watcher:
    """The job's end of the pipe."""

    def __init__(self, run_id: str, spool_folder: Path) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tsp.tracking.watcher", run_id, str(spool_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe: IO[bytes] = self._process.stdin
        # A forked worker that outlives the job must not hold the pipe open.
        os.register_at_fork(after_in_child=self._pipe.close)

    def close(self, *, delivered: bool) -> None:
        """The job has ended. What MLflow has not taken yet is the watcher's now; else there is nothing to do for it."""
        try:
            if delivered:
                self._pipe.write(CLOSED)
            self._pipe.close()
        except OSError:
            pass  # The watcher is gone already.
        self._process.wait()  # Its first process has ended long ago, see `main`.


def watch(run_id: str, folder: Path) -> None:
    """Wait for the end of the job; then deliver what it could not, and set its status if it did not do so itself."""
    if sys.stdin.buffer.read().endswith(CLOSED):
        return
    from tsp.tracking.spool import recover

    deadline = time.monotonic() + PATIENCE_S
    while True:
        recover(folder, run_id)
        # It may be there and locked: by the job, which ends, or by one that goes on with the run.
        if not (folder / f"{run_id}.jsonl").exists() or time.monotonic() > deadline:
            return
        time.sleep(PAUSE_S)


def main() -> None:
    """Leave the process tree of the job, then watch.

    The deepspeed launcher ends a failed job with SIGTERM to all descendants; an orphan is none of them.
    """
    if os.fork():
        os._exit(0)
    run_id, folder = sys.argv[1], Path(sys.argv[2])
    if any(path.stem != run_id for path in folder.glob("*.jsonl")):
        _deliver_earlier(folder)
    watch(run_id, folder)


def _deliver_earlier(folder: Path) -> None:
    """In a process that ends: mlflow takes memory that a sleeper should not hold."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for it.
    if os.fork() == 0:
        with suppress(BaseException):
            from tsp.tracking.spool import sync

            sync(folder.parent.parent)
        os._exit(0)


if __name__ == "__main__":
    main()

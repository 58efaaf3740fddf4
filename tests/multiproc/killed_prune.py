"""`launchers/prune.py` that gets a signal after a step: KILL_AFTER=stage2:3 KILL_SIGNAL=SIGTERM.

The number counts the logged steps of a stage, or with `journal` the measurements. SIGKILL, the default, goes to the
launcher and its ranks at once, another signal to rank 0 alone. With HELD_BY=FILE rank 0 makes the file instead, and
stands still for as long as it is there.
"""

import os
import runpy
import signal
import time
from pathlib import Path

from tsp import journal
from tsp.methods.base import Bench

if __name__ == "__main__":
    where, _, times = os.environ["KILL_AFTER"].partition(":")
    left, number = int(times), signal.Signals[os.environ.get("KILL_SIGNAL", "SIGKILL")]
    logged, appended = Bench.log, journal._append

    def strike():
        if "HELD_BY" in os.environ:
            file = Path(os.environ["HELD_BY"])
            file.touch()
            while file.exists():
                time.sleep(0.05)
        elif number == signal.SIGKILL:
            os.killpg(0, number)
        else:
            os.kill(os.getpid(), number)

    def count(place):
        global left
        left -= place == where
        if left == 0:
            strike()

    def log(bench, stage, stats, gates, more=None):
        logged(bench, stage, stats, gates, more)
        if bench.engine.is_first:
            count(stage)

    def append(path, entry):
        appended(path, entry)
        count("journal")

    Bench.log, journal._append = log, append
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "launchers" / "prune.py"), run_name="__main__")

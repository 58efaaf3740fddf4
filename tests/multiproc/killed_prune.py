"""`launchers/prune.py` that gets a signal after a step: KILL_AFTER=stage2:3 KILL_SIGNAL=SIGTERM.

The number counts the logged steps of a stage, or with `journal` the measurements. SIGKILL goes to launcher and ranks at
once, another signal to rank 0 alone.
"""

import os
import runpy
import signal
from pathlib import Path

from tsp import journal
from tsp.methods.base import Bench

if __name__ == "__main__":
    where, _, times = os.environ["KILL_AFTER"].partition(":")
    left, number = int(times), signal.Signals[os.environ["KILL_SIGNAL"]]
    logged, appended = Bench.log, journal._append

    def count(place):
        global left
        left -= place == where
        if left == 0 and number == signal.SIGKILL:
            os.killpg(0, number)
        elif left == 0:
            os.kill(os.getpid(), number)

    def log(bench, stage, stats, gates, more=None):
        logged(bench, stage, stats, gates, more)
        if bench.engine.is_first:
            count(stage)

    def append(path, entry):
        appended(path, entry)
        count("journal")

    Bench.log, journal._append = log, append
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "launchers" / "prune.py"), run_name="__main__")

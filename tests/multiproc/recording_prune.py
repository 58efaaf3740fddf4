"""`launchers/prune.py` that also keeps, beside the tracker, every gate value that the loop produced.

RECORDED_GATES=FILE deepspeed tests/multiproc/recording_prune.py ...    # options of launchers/prune.py
"""

import json
import os
import runpy
from pathlib import Path

from tsp.methods.base import Bench

if __name__ == "__main__":
    rows: list[dict] = []
    logged = Bench.log

    def log(bench, stage, stats, gates, more=None):
        rows.append({"step": bench.global_step, "stage": stage, "gates": gates, "losses": dict(stats.losses)})
        if bench.engine.is_first:
            Path(os.environ["RECORDED_GATES"]).write_text(json.dumps(rows))
        logged(bench, stage, stats, gates, more)

    Bench.log = log
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "launchers" / "prune.py"), run_name="__main__")

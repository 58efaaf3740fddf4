"""What logging costs the training loop: 80 gates and 6 losses at every step, into the embedded sqlite store.

    python benchmarks/tracking_overhead.py [--steps 300] [--step-ms 500] [--json]

The caller's cost is what the loop waits in `Tracker.metrics`. The CPU cost adds the sender thread, which works beside
the loop: all CPU time until a step's records are in the database, as a share of what all cores offer in a step.
Both are set against a step of `--step-ms`. Between two calls the loop sleeps a little, so that the sender competes with
it as it does in a job.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from _rows import row, show

from tsp.tracking.run import start_run

NUM_GATES = 80
LOSSES = ("total", "lm", "penalty", "distill", "gap", "entropy")
PAUSE_S = 0.01


def measure(root: Path, num_steps: int) -> dict[str, float]:
    """Milliseconds a step: median and mean of the caller, CPU of all threads."""
    tracker = start_run(root, experiment="benchmark", run_name=None, tags={}, params={})
    calls_ms = []
    cpu_s = time.process_time()
    for step in range(num_steps):
        values = {f"stage1/gate/layer_{i:03d}": 1.0 - step * i / 1e5 for i in range(NUM_GATES)}
        values |= {f"stage1/loss/{name}": 2.0 / (step + 1) for name in LOSSES}
        start = time.perf_counter()
        tracker.metrics(values, step)
        calls_ms.append(1e3 * (time.perf_counter() - start))
        time.sleep(PAUSE_S)
    tracker.finish("FINISHED")
    cpu_ms = 1e3 * (time.process_time() - cpu_s) / num_steps
    return {"median_ms": statistics.median(calls_ms), "mean_ms": statistics.mean(calls_ms), "cpu_ms": cpu_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", type=float, default=500.0, help="time of a training step to compare with")
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory() as root:
        cost = measure(Path(root), args.steps)
    show(
        [
            row("tracking_caller_ms_per_step", cost["median_ms"], "<=", 0.2),
            row("tracking_caller_pct_of_step", 100 * cost["mean_ms"] / args.step_ms, "<=", 1.0),
            row("tracking_cpu_pct_of_machine", 100 * cost["cpu_ms"] / args.step_ms / (os.cpu_count() or 1), "<=", 2.0),
        ],
        as_json=args.json,
    )


if __name__ == "__main__":
    main()

"""What a user waits for before anything happens: the help, a dry run, the first training step of a job.

    python benchmarks/startup.py [--json]

Best of five calls of `tsp --help`, of three `tsp prune --dry-run`, of three jobs. The first step is that of stage 1 on
the demo model, from the start of `deepspeed` to the end of the step, with the evaluation before it cut to one window;
DeepSpeed's one-time compilation is not in it if an earlier job has done it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _jobs import settings
from _rows import row, show

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LAUNCH = [BIN / "deepspeed", REPOSITORY / "launchers/prune.py", "--ds", REPOSITORY / "ds_configs/zero3.json"]
SHORT = settings(
    stage1__schedule="budget",
    stage1__steps=1,
    transfer="none",
    save="false",
    prune__verify_blocks=1,
    eval__max_blocks=1,
    eval__speed_runs=0,
    eval__prompts=0,
)


def call(folder: str, *command: object) -> float:
    """Seconds that a command takes, which must succeed."""
    started = time.perf_counter()
    subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def first_step() -> float:
    """Seconds from the launcher's start until the metrics of step 0 were told."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        call(folder, *LAUNCH, *SHORT, "--experiment", "startup")
        client = MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
        [run] = client.search_runs([client.get_experiment_by_name("startup").experiment_id])
        [point] = client.get_metric_history(run.info.run_id, "stage1/loss/total")
        return point.timestamp / 1000 - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        help_s = min(call(folder, BIN / "tsp", "--help") for _ in range(5))
        plan_s = min(call(folder, BIN / "tsp", "prune", "--dry-run") for _ in range(3))
    print(f"tsp prune --dry-run: {plan_s:.1f} s", file=sys.stderr)
    show(
        [
            row("help_s", help_s, "<=", 0.4),
            row("first_step_s", min(first_step() for _ in range(3)), "<=", 20.0),
        ],
        as_json=args.json,
    )


if __name__ == "__main__":
    main()

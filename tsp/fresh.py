"""Run a module of ours in a fresh process: nothing of this job's engine, ranks or shards helps it."""

import os
import subprocess
import sys

# Set by `deepspeed` and torchrun for the ranks; a process that has them takes itself for one.
LAUNCHER_VARIABLES = {
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
}


def run_fresh(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m module words...`, its output captured; the caller looks at the exit code."""
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES},
    )

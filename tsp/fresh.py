"""Run a module of ours in a fresh process: nothing of this job's engine, ranks or shards helps it."""

import json
import os
import subprocess
import sys
from typing import Any

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


def told_fresh(module: str, *words: str) -> dict[str, Any]:
    """What `python -m module words...` tells: the JSON object in the last line that it prints.

    The lines before are of others, of a model's own code for example.

    Raises:
        ChildProcessError: it failed; with the last line of its complaint.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES},
    )
    if done.returncode:
        raise ChildProcessError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told

"""What a newcomer waits for: the default job from the launcher's start to its end.

    python benchmarks/first_run.py [--json]

The job runs once, in a new folder; DeepSpeed's one-time compilation is not in it if an earlier job has done it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _rows import row, show

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    launch = [BIN / "deepspeed", REPOSITORY / "launchers/prune.py", "--ds", REPOSITORY / "ds_configs/zero3.json"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [str(word) for word in (*launch, "--output", "out")]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        job_s = time.perf_counter() - started
        result = json.loads((Path(folder) / "out" / "result.json").read_text())
    ppl = result["perplexity"]["stdlib"]
    show(
        [
            row("default_job_s", job_s, "<=", 240.0),
            row("default_job_ppl_pruned_over_bare_drop", ppl["pruned"] / ppl["bare_drop"], "<=", 1.0),
        ],
        as_json=args.json,
    )


if __name__ == "__main__":
    main()

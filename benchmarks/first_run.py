"""What a newcomer waits for: `tsp --help`, and the default job from the launcher's start to its end.

    python benchmarks/first_run.py [--json]

The help is the best of five calls. The job runs once, in a new folder; DeepSpeed's
one-time compilation is not in it if an earlier job has done it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def seconds(command: list[str], folder: str) -> float:
    """Wall time of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    launch = [BIN / "deepspeed", REPOSITORY / "launchers/prune.py", "--ds", REPOSITORY / "ds_configs/zero3.json"]
    with tempfile.TemporaryDirectory() as folder:
        help_s = min(seconds([str(BIN / "tsp"), "--help"], folder) for _ in range(5))
        job_s = seconds([*map(str, launch), "--output", "out"], folder)
        result = json.loads((Path(folder) / "out" / "result.json").read_text())
    ppl = result["perplexity"]["stdlib"]
    measured = {
        "help_s": (help_s, 0.4),
        "default_job_s": (job_s, 240.0),
        "default_job_ppl_pruned_over_bare_drop": (ppl["pruned"] / ppl["bare_drop"], 1.0),
    }
    rows = [
        {"name": name, "value": round(value, 3), "target": target, "op": "<=", "ok": value <= target}
        for name, (value, target) in measured.items()
    ]
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(
                f"{row['name']:40} {row['value']:8.3f}  (target <= {row['target']}) {'ok' if row['ok'] else 'MISSED'}"
            )


if __name__ == "__main__":
    main()

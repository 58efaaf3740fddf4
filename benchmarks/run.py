"""All benchmarks: `python benchmarks/run.py [NAME ...]` prints a table and writes results.json.

Each is a file here that with `--json` prints, as its last line, its rows `{name, value, target, op, ok}`. With names
only those are run, and the other rows of results.json stay. Exit code 3 if a target is missed.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
BENCHMARKS = (
    "training_step",
    "selection",
    "hardware",
    "tracking_overhead",
    "memory",
    "startup",
    "first_run",
    "growth",
    "files",
    "drop_memory",
    "gpu",
)


def main() -> None:
    chosen = sys.argv[1:] or BENCHMARKS
    rows = []
    for name in chosen:
        print(f"{name} ...", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, HERE / f"{name}.py", "--json"], stdout=subprocess.PIPE, text=True, check=True
        )
        rows += json.loads(done.stdout.splitlines()[-1])  # Libraries print to stdout, too.
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() and sys.argv[1:] else []
    measured = {row["name"] for row in rows}
    kept = [row for row in known if row["name"] not in measured]
    RESULTS.write_text(json.dumps(kept + rows, indent=1) + "\n")
    table = Table()
    for heading in ("benchmark", "value", "target", ""):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["name"], f"{row['value']:g}", f"{row['op']} {row['target']:g}", "ok" if row["ok"] else "MISSED"
        )
    Console().print(table)
    sys.exit(0 if all(row["ok"] for row in rows) else 3)


if __name__ == "__main__":
    main()

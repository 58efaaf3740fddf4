"""All benchmarks: `python benchmarks/run.py` prints a table and writes results.json; exit 3 if a target is missed.

Each other file here is one benchmark; with `--json` it prints its rows `{name, value, target, op, ok}`.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def main() -> None:
    rows = []
    for script in sorted(HERE.glob("*.py")):
        if script.name != Path(__file__).name:
            print(f"{script.name} ...", file=sys.stderr)
            done = subprocess.run([sys.executable, script, "--json"], stdout=subprocess.PIPE, text=True, check=True)
            rows += json.loads(done.stdout)
    (HERE / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
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

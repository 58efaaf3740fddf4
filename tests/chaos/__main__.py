"""`make chaos`: kill jobs and promotions, stop the tracking server, run many jobs at once; exit code 3 if it shows."""

import argparse
import random
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.faults import Row, crowd, kills, outages, promotions, undisturbed
from tests.chaos.world import World


def run(root: Path, *, num_kills: int, num_outages: int, num_jobs: int, num_promotions: int, seed: int) -> list[Row]:
    """All faults, one kind after the other.

    Args:
        root: an empty folder.
        num_kills: of jobs.
        num_outages: of the tracking server.
        num_jobs: at once on one store.
        num_promotions: that are killed.
        seed: of the moments.
    """
    dice = random.Random(seed)
    (root / "store").mkdir()
    world = World(root / "store")
    expected = undisturbed(world)
    rows = []
    for row in (
        lambda: kills(world, expected, num_kills, dice),
        lambda: promotions(world, num_promotions, dice),
        lambda: crowd(world, expected, num_jobs),
        lambda: outages(root / "outages", num_outages, dice),
    ):
        rows.append(row())
        print(*map(str, asdict(rows[-1]).items()), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="make chaos")
    for name, default in (("kills", 50), ("promotions", 10), ("jobs", 8), ("outages", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(
            Path(folder),
            num_kills=given.kills,
            num_outages=given.outages,
            num_jobs=given.jobs,
            num_promotions=given.promotions,
            seed=given.seed,
        )
    table = Table(title=f"faults, seed {given.seed}")
    for field in fields(Row):
        table.add_column(field.name.replace("_", " "), justify="left" if field.name == "fault" else "right")
    for row in rows:
        table.add_row(*map(str, asdict(row).values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    sys.exit(0 if all(row.faultless for row in rows) else 3)


if __name__ == "__main__":
    main()

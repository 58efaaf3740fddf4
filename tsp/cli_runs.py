"""The commands that put a store in order after crashes and outages: sync, runs reap."""

import json
import sys
from pathlib import Path

import click

from tsp.exits import exit_codes, stdout_kept_clean
from tsp.options import Command, Group

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


@click.command(cls=Command)
@_json
def sync(as_json: bool) -> None:
    """Deliver to MLflow what earlier jobs could not; exit 1 where some of it is left."""
    with exit_codes(), stdout_kept_clean() as stdout:
        from tsp.tracking.spool import held_by_others
        from tsp.tracking.spool import sync as deliver

        found = deliver(Path.cwd())
        delivered = [entry._asdict() for entry in found]
        held = held_by_others(Path.cwd(), found)
        if as_json:
            print(json.dumps(delivered), file=stdout)
        else:
            for entry in delivered or ([] if held else [{"nothing": "left to deliver"}]):
                print(" ".join(f"{key} {value}" for key, value in entry.items()), file=stdout)
        if held:
            click.echo(f"running jobs, or what delivers for them, still write: {', '.join(held)}", err=True)
    sys.exit(1 if any(entry.left for entry in found) else 0)


@click.group(cls=Group)
def runs() -> None:
    """Put the runs of a store in order: reap."""


@runs.command(cls=Command)
@click.option(
    "--hours", type=click.FloatRange(min=0.1), default=24.0, show_default=True, help="Silent for so long is lost."
)
@click.option("--dry-run", is_flag=True, help="Only say which runs would be closed.")
@_json
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def reap(hours: float, dry_run: bool, as_json: bool, debug: bool) -> None:
    """Close runs whose process is gone; those of other machines after hours of silence."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.report_registry import print_lost_runs
        from tsp.tracking.lost_runs import close, lost_runs
        from tsp.tracking.spool import sync as deliver

        root = Path.cwd()
        delivered = [] if dry_run else deliver(root)
        lost = lost_runs(root, silent_h=hours)
        for run in [] if dry_run else lost:
            close(root, run)
        document = {
            "delivered": [entry._asdict() for entry in delivered],
            "lost": [run.as_row() for run in lost],
            "closed": not dry_run,
        }
        if as_json:
            print(json.dumps(document), file=stdout)
        else:
            print_lost_runs(document, stdout)

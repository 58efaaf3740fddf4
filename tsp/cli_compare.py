"""`tsp compare` and `tsp advise`: the finished jobs of an experiment side by side, and what to do next."""

import json
import shlex
import sys
from pathlib import Path

import click

from tsp.errors import ConfigError
from tsp.exits import exit_codes, stdout_kept_clean
from tsp.masking import masked
from tsp.options import Command


@click.command(cls=Command)
@click.argument("experiment")
@click.option(
    "--by", default="method,transfer,num_drop", show_default=True, help="What a row is: names or dotted settings."
)
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="FILE.html", help="Also write one page with figures."
)
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of one device, for the page's table of costs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def compare(
    experiment: str, by: str, report: Path | None, price_per_hour: float | None, as_json: bool, debug: bool
) -> None:
    """Compare the finished jobs of an experiment: tables, what is more than chance, and who won, in words."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        if price_per_hour is not None and report is None:
            raise ConfigError("--price-per-hour is for the page's table of costs; give --report FILE.html, too")
        if report is not None and report.is_dir():
            raise ConfigError(f"--report must be the file to write, got the folder {report}")
        from tsp.compare.groups import compare as make_comparison
        from tsp.compare.outputs import as_document
        from tsp.compare.page import write_report
        from tsp.report_compare import print_comparison
        from tsp.tracking.results import finished_jobs

        comparison = make_comparison(finished_jobs(Path.cwd(), experiment), by.split(","))
        if report is not None:
            command = masked(shlex.join(["tsp", *sys.argv[1:]]))
            write_report(comparison, report, price_per_hour=price_per_hour, command=command)
        if as_json:
            print(json.dumps(as_document(comparison)), file=stdout)
        else:
            print_comparison(comparison, stdout)


@click.command(cls=Command)
@click.argument("experiment")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def advise(experiment: str, as_json: bool, debug: bool) -> None:
    """Say what the finished jobs of an experiment mean: how far, what breaks, what text, what next."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from dataclasses import asdict

        from tsp.advise import advise as find
        from tsp.compare.groups import compare as make_comparison
        from tsp.report_compare import print_advice
        from tsp.tracking.results import finished_jobs

        found = find(make_comparison(finished_jobs(Path.cwd(), experiment)))
        if as_json:
            print(json.dumps({"schema": 1, "experiment": experiment, "advice": list(map(asdict, found))}), file=stdout)
        else:
            print_advice(found, stdout)

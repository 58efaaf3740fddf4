"""The registry on the terminal: verdicts, histories, versions side by side."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 200
"""Characters of a line where stdout is no terminal: nothing is cut or folded."""


def print_decision(document: Mapping[str, Any], stdout: TextIO) -> None:
    """What was required and found, and what became of the alias."""
    console = _console(stdout)
    name, alias, version = document["model"], document["alias"], document["version"]
    if document["unchanged"]:
        console.print(f"version {version} of {name} is {alias} already; nothing was changed")
        return
    rows = document["verdicts"]
    if rows:
        now = f"version {document['previous']}" if document["previous"] else "no version"
        title = f"{name}: version {version} as {alias} ({now} has it)"
        _print_rows(console, title, ("requirement", "measured", "verdict", "note"), [_verdict(row) for row in rows])
    would = "would be " if document["dry_run"] else ""
    if document["outcome"] == "refused":
        console.print(f"{would}refused{_run(document)}")
        return
    before = f", before it version {document['previous']}" if document["previous"] else ""
    console.print(f"models:/{name}@{alias} {'would be' if would else 'is'} version {version}{before}{_run(document)}")


def print_audit(document: Mapping[str, Any], stdout: TextIO) -> None:
    """The history, who has which alias, the files, and what is not as it was decided."""
    console = _console(stdout)
    history = [
        (
            _when(one["time_ms"]),
            one["alias"],
            f"{one['previous'] or 'none'} -> {one['version']}",
            one["kind"],
            one["outcome"] if one["carried_out"] else f"{one['outcome']}, interrupted",
            one["who"],
            "; ".join(filter(None, (one["reason"], one["refusal"]))),
        )
        for one in document["decisions"]
    ]
    headings = ("when (UTC)", "alias", "version", "kind", "outcome", "who", "why")
    _print_rows(console, f"decisions about {document['model']}", headings, history)
    for alias, version in sorted(document["aliases"].items()):
        console.print(f"{alias:<20} version {version}")
    for version, found in document["files"].items():
        console.print(f"files of version {version:<3} {found}")
    for fault in document["faults"]:
        console.print(f"fault: {fault}")
    if not document["faults"]:
        console.print("all as it was decided")


def _verdict(row: Mapping[str, Any]) -> tuple[str, ...]:
    measured = row["measured"]
    shown = "" if measured is None else measured if isinstance(measured, str) else f"{measured:.6g}"
    return row["requirement"], shown, row["verdict"], row["note"]


def _run(document: Mapping[str, Any]) -> str:
    return f" (decision {document['run_id']})" if document["run_id"] else ""


def _when(time_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time_ms / 1000))


def _print_rows(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _console(stdout: TextIO) -> Console:
    return Console(file=stdout, highlight=False, markup=False, width=None if stdout.isatty() else _FILE_WIDTH)

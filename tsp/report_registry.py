"""The registry on the terminal: verdicts, histories, versions side by side."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from tsp.console import console


def print_decision(document: Mapping[str, Any], stdout: TextIO) -> None:
    """What was required and found, and what became of the alias."""
    out = console(stdout)
    name, alias, version = document["model"], document["alias"], document["version"]
    if document["unchanged"]:
        out.print(f"version {version} of {name} is {alias} already; nothing was changed")
        return
    rows = document["verdicts"]
    if rows:
        now = f"version {document['previous']}" if document["previous"] else "no version"
        title = f"{name}: version {version} as {alias} ({now} has it)"
        _print_rows(out, title, ("requirement", "measured", "verdict", "note"), [_verdict(row) for row in rows])
    would = "would be " if document["dry_run"] else ""
    if document["outcome"] == "refused":
        out.print(f"{would}refused{_run(document)}")
        return
    before = f", before it version {document['previous']}" if document["previous"] else ""
    out.print(f"models:/{name}@{alias} {'would be' if would else 'is'} version {version}{before}{_run(document)}")


def print_audit(document: Mapping[str, Any], stdout: TextIO) -> None:
    """The history, who has which alias, the files, and what is not as it was decided."""
    out = console(stdout)
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
    _print_rows(out, f"decisions about {document['model']}", headings, history)
    for alias, version in sorted(document["aliases"].items()):
        out.print(f"{alias:<20} version {version}")
    for version, found in document["files"].items():
        out.print(f"files of version {version:<3} {found}")
    for fault in document["faults"]:
        out.print(f"fault: {fault}")
    if not document["faults"]:
        out.print("all as it was decided")


def print_overview(rows: Sequence[Mapping[str, Any]], stdout: TextIO) -> None:
    """A line for each version, and what it is called in MLflow's UI."""
    table = [
        (
            row["model"],
            row["version"],
            ", ".join(row["aliases"]),
            row["base_model"] or "",
            f"{len(row['dropped'])} of {row['num_layers']}" if row["dropped"] is not None else "",
            "+".join(filter(None, (row["method"], row["transfer"]))),
            *(_number(row["measured"].get(name)) for name in ("ppl_ratio", "worst_slice_ratio", "speedup")),
            _number(row["measured"].get("parameters_ratio")),
            _when(row["created_ms"]),
        )
        for row in rows
    ]
    headings = ("model", "version", "aliases", "made from", "layers gone", "by", "ppl ratio", "worst slice", "speed-up")
    _print_rows(console(stdout), "registered models", (*headings, "parameters", "registered (UTC)"), table)


def print_version(document: Mapping[str, Any], stdout: TextIO) -> None:
    """What it was made from and how, and all that was measured."""
    out = console(stdout)
    title, calibration = f"{document['model']} version {document['version']}", document["calibration"]
    facts = [
        ("aliases", ", ".join(document["aliases"]) or "none"),
        ("made from", " ".join(filter(None, (document["base_model"], document["base_revision"])))),
        ("layers gone", f"{_text(document['dropped'])} of {document['num_layers']}"),
        ("selection, transfer", " ".join(filter(None, (document["method"], document["transfer"])))),
        (
            "calibration text",
            " ".join(((calibration or {}).get("name", ""), _about(calibration, "num_blocks"))).strip(),
        ),
        *((f"measured on {name}", _about(row, "num_windows")) for name, row in document["corpora"].items()),
        ("registered (UTC)", _when(document["created_ms"])),
        ("run", document["run_id"] or "none"),
    ]
    _print_rows(out, title, ("", ""), facts)
    measured = [(name, _number(value)) for name, value in document["measured"].items()]
    _print_rows(out, "measured", ("value", ""), measured)
    if document["link"]:
        out.print(f"look        tsp ui   # then {document['link']}")


def print_comparison(document: Mapping[str, Any], stdout: TextIO) -> None:
    """Where two versions differ."""
    out = console(stdout)
    sides = (document["a"], document["b"])
    for title, rows in (("made otherwise", document["made"]), ("other settings", document["settings"])):
        if rows:
            table = [(row["name"], _text(row["a"]), _text(row["b"])) for row in rows]
            _print_rows(out, title, ("", *sides), table)
    measured = [(row["name"], *(_number(row[key]) for key in ("a", "b", "b_to_a"))) for row in document["measured"]]
    _print_rows(out, "measured", ("value", *sides, "second to first"), measured)


def print_leftovers(document: Mapping[str, Any], stdout: TextIO) -> None:
    """What goes, how much room that makes, and how it is made to go."""
    out = console(stdout)
    rows = document["leftovers"]
    if not rows:
        out.print("nothing is left over")
        return
    table = [(row["what"], f"{row['bytes'] / 2**20:,.1f}", row["why"], row["where"]) for row in rows]
    _print_rows(out, "needed by nothing", ("what", "MiB", "why", "where"), table)
    total = sum(row["bytes"] for row in rows) / 2**20
    done = "were removed" if document["deleted"] else "would be removed by `tsp gc --delete`"
    out.print(f"{len(rows)} things with {total:,.1f} MiB {done}")


def print_lost_runs(document: Mapping[str, Any], stdout: TextIO) -> None:
    """Runs whose process is gone, and what became of them."""
    out = console(stdout)
    for entry in document["delivered"]:
        out.print(f"run {entry['run_id']}: {entry['delivered']} records delivered, {entry['left']} left")
    rows = document["lost"]
    if not rows:
        out.print("no run is lost")
        return
    table = [(row["experiment"], row["name"], row["run_id"], f"{row['silent_h']:,.1f}") for row in rows]
    _print_rows(out, "silent for too long", ("experiment", "name", "run", "hours"), table)
    out.print(f"{len(rows)} runs {'are KILLED now' if document['closed'] else 'would be closed without --dry-run'}")


def _about(text: Mapping[str, Any] | None, counted: str) -> str:
    if not text:
        return "unknown"
    return f"{text['fingerprint']}, {text[counted]} x {text['block_tokens']} tokens"


def _number(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _verdict(row: Mapping[str, Any]) -> tuple[str, ...]:
    measured = row["measured"]
    shown = "" if measured is None else measured if isinstance(measured, str) else f"{measured:.6g}"
    return row["requirement"], shown, row["verdict"], row["note"]


def _run(document: Mapping[str, Any]) -> str:
    return f" (decision {document['run_id']})" if document["run_id"] else ""


def _when(time_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time_ms / 1000))


def _print_rows(out: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # A title that is longer than its table would be folded.
    table = Table(title=title, min_width=len(title))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)

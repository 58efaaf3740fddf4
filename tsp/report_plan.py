"""A plan on the terminal: memory by part and time by phase, and whether it fits."""

from collections.abc import Mapping
from typing import Any, TextIO

from rich.table import Table

from tsp.console import console


def print_estimate(document: Mapping[str, Any], stdout: TextIO) -> None:
    """Phases in columns, parts of the memory in rows, then the verdict."""
    out = console(stdout)
    phases = document["phases"]
    device = f"{document['nodes']} x {document['gpus_per_node']} of {document['gpu']['memory_gib']:.1f} GiB"
    table = Table(title=f"{document['model']}, {document['parameters'] / 1e9:,.3g} billion parameters, on {device}")
    for heading in ("each rank", *(phase["name"] for phase in phases)):
        table.add_column(heading, justify="left" if heading == "each rank" else "right")
    parts = dict.fromkeys(part for phase in phases for part in phase["memory_gib"])
    for part in parts:
        table.add_row(f"{part}, GiB", *(_gib(phase["memory_gib"].get(part)) for phase in phases))
    table.add_section()
    table.add_row("together, GiB", *(_gib(phase["total_gib"]) for phase in phases))
    table.add_row("traffic of a pass, GB", *(f"{phase['traffic_gb_per_pass']:,.1f}" for phase in phases))
    table.add_row("tokens/s, all ranks", *(f"{phase['tokens_per_s']:,}" for phase in phases))
    table.add_row("time", *(_time(phase["seconds"]) for phase in phases))
    out.print(table)
    out.print(f"time {_time(document['seconds'])}, disk {document['disk_gib']:,.1f} GiB")
    if document["bound"]:
        out.print(
            f"for {document['num_drop']} of {document['num_layers']} layers: how many keep to {document['bound']} is "
            "found by the job, with a selection and, where perplexity decides, a transfer for each one that it tries",
            soft_wrap=True,
        )
    if document["fits"]:
        out.print(f"fits: {document['peak_gib']:,.1f} of {document['gpu']['memory_gib']:.1f} GiB")
        return
    remedy = document["remedy"]
    advice = f"it would with {remedy}" if remedy else "nor with 1024 ranks; take other hardware or ds_configs/*offload*"
    out.print(f"does not fit: {document['peak_gib']:,.1f} GiB; {advice}", soft_wrap=True)


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

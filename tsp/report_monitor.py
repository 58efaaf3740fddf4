"""What a person sees of a look at a model in use: the whole and each slice, and what became of the requirements."""

from collections.abc import Mapping
from typing import Any, TextIO

from rich.table import Table

from tsp.console import console

_COLUMNS = {
    "loss": ("loss", ".4f"),
    "ratio": ("ppl, times the other's", ".3f"),
    "kl": ("KL", ".4f"),
    "top1": ("same top 1", ".1%"),
    "repetition": ("repeats itself", ".1%"),
}


def print_look(document: Mapping[str, Any], stdout: TextIO) -> None:
    """Tables, and where it is kept."""
    out = console(stdout)
    measured = document["measured"]
    table = Table(title=f"{document['name']} version {document['version']} against {document['against']}")
    for heading in ("", "tokens", *(heading for heading, _ in _COLUMNS.values())):
        table.add_column(heading, justify="right" if heading else "left")
    about = document["requests"]
    whole = {kind: measured.get(kind) for kind in _COLUMNS} | {"ratio": measured.get("ppl_ratio")}
    _add(table, "all requests", about["num_windows"] * (about["block_tokens"] - 1), whole)
    for rows in document["evaluation"]["slices"].values():
        for name, row in rows.items():
            _add(table, name, row["num_tokens"], {kind: measured.get(f"slice_{kind}/{name}") for kind in _COLUMNS})
    out.print(table)
    if document["requirements"]:
        table = Table(title="requirements")
        for heading in ("requirement", "measured", "verdict", "note"):
            table.add_column(heading, overflow="fold")
        for row in document["requirements"]:
            value = row["measured"]
            shown = "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"
            table.add_row(row["requirement"], shown, row["verdict"], row["note"])
        out.print(table)
    out.print(f"look        tsp ui   # then {document['link']}", soft_wrap=True)


def _add(table: Table, name: str, num_tokens: int, values: Mapping[str, float | None]) -> None:
    cells = ("-" if (value := values[kind]) is None else format(value, form) for kind, (_, form) in _COLUMNS.items())
    table.add_row(name, f"{num_tokens:,}", *cells)

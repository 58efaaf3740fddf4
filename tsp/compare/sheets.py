"""Tables as text, for the terminal and for the page: which columns, what stands in each cell, and its mark."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tsp.compare.groups import Table
from tsp.compare.measures import COST, Column, Stat, columns, of_the_table
from tsp.compare.rows import Row

LEGEND = (
    "* best of the rows with as many layers; ~ perplexity that cannot be told from the best (95 %, paired bootstrap "
    "over the windows, seeds averaged); ± standard deviation over the n seeds; x dense: times the dense model's"
)

_WITH_SPREAD = ("ppl/", "worst_slice", "task", "kl/", "top1/", "seconds")
"""Of the others it says nothing more; the JSON document has it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell."""

    text: str
    number: bool = True
    best: bool = False
    tied: bool = False

    @property
    def marked(self) -> str:
        """The text with its mark, as paper without bold type needs it."""
        return self.text + ("*" if self.best else "") + ("~" if self.tied else "")


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Headings and cells."""

    headings: list[str]
    rows: list[list[Cell]]
    blocks: tuple[int, ...] = ()
    """Rows before which a line is drawn: another number of layers, or the floor."""


def main_sheet(table: Table, by: Sequence[str]) -> Sheet:
    """The rows of a table, and below them the floor."""
    rows = [*table.rows, *table.floor]
    names = dict.fromkeys(name for row in rows for name in row.stats)
    return _sheet(rows, by, of_the_table(columns(names)))


def cost_sheet(table: Table, by: Sequence[str], price_per_hour: float | None) -> Sheet:
    """What each row cost, and what serving costs after it.

    Args:
        table: of a group.
        by: names of the rows.
        price_per_hour: of one device, in any currency; None: no money is shown.
    """
    found = [column for column in columns(COST) if any(column.name in row.stats for row in table.rows)]
    rows = [*table.rows, *table.floor]
    plain = _sheet(rows, by, found, marks=False)
    if price_per_hour is None:
        return plain
    for row, cells in zip(rows, plain.rows, strict=True):
        for name in ("device_hours", "served_device_hours"):
            stat = row.stats.get(name)
            cells.append(Cell(text=f"{stat.mean * price_per_hour:.4g}" if stat else "-"))
    at = f"at {price_per_hour:g} per device-hour"
    headings = [*plain.headings, f"price of the job, {at}", f"price per million served tokens, {at}"]
    return replace(plain, headings=headings)


def task_sheet(table: Table, by: Sequence[str]) -> Sheet | None:
    """Each task's accuracy; None where no task was measured."""
    names = dict.fromkeys(name for row in table.rows for name in row.stats if name.startswith("task/"))
    return _sheet([*table.rows, *table.floor], by, columns(names)) if names else None


def _sheet(rows: Sequence[Row], by: Sequence[str], found: Sequence[Column], *, marks: bool = True) -> Sheet:
    has_setting = any(row.chosen or row.differs for row in rows)
    keys = [key for key in by if key not in ("num_drop", "ratio")]
    headings = [
        *keys,
        "layers dropped",
        *(["setting"] if has_setting else []),
        "n",
        *(column.title for column in found),
    ]
    blocks = tuple(place for place in range(1, len(rows)) if rows[place].num_drop != rows[place - 1].num_drop)
    cells = [_cells(row, keys, has_setting, found, marks) for row in rows]
    return Sheet(headings=headings, rows=cells, blocks=blocks)


def _cells(row: Row, keys: Sequence[str], has_setting: bool, found: Sequence[Column], marks: bool) -> list[Cell]:
    num_layers = row.jobs[0].result["num_layers"]
    cells = [Cell(text=str(row.keys[key]), number=False) for key in keys]
    cells.append(Cell(text=f"{row.num_drop} of {num_layers}"))
    if has_setting:
        settings = [f"{key}={value} (chosen)" for key, value in row.chosen.items()]
        settings += [f"{key}={value}" for key, value in row.differs.items()]
        cells.append(Cell(text=", ".join(settings), number=False))
    cells.append(Cell(text=str(len(row.jobs))))
    for column in found:
        stat = row.stats.get(column.name)
        corpus = column.name.removeprefix("ppl/") if column.name.startswith("ppl/") else None
        best, tied = marks and column.name in row.best, marks and corpus in row.tied
        cells.append(Cell(text=_text(column, stat), best=best, tied=tied))
    return cells


def _text(column: Column, stat: Stat | None) -> str:
    if stat is None:
        return "-"
    shown = column.text(stat.spread) if stat.spread and column.name.startswith(_WITH_SPREAD) else ""
    return column.text(stat.mean) + (f" ± {shown}" if shown.strip("0.") else "")

"""A comparison on the terminal: a table per group and budget, and the verdict in words."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from tsp.advise import Advice
from tsp.compare.groups import Comparison
from tsp.compare.sheets import LEGEND, Cell, main_sheet

_FILE_WIDTH = 400
"""Characters of a line where stdout is no terminal: nothing is cut or folded."""


def print_comparison(comparison: Comparison, stdout: TextIO) -> None:
    """Print all tables and the verdict."""
    console = Console(file=stdout, highlight=False, width=None if stdout.isatty() else _FILE_WIDTH)
    for group in comparison.groups:
        console.print(Text(group.heading, style="bold"))
        dense = ", ".join(f"{corpus} {ppl:.4g}" for corpus, ppl in group.dense.items())
        console.print(Text(f"dense: {group.parameters:,} parameters, perplexity {dense}"))
        for table in group.tables:
            sheet = main_sheet(table, comparison.by)
            rich_table = RichTable(title=f"compared {table.heading}", title_justify="left")
            for heading, cell in zip(sheet.headings, sheet.rows[0], strict=True):
                rich_table.add_column(heading, justify="right" if cell.number else "left", overflow="fold")
            for place, cells in enumerate(sheet.rows):
                if place in sheet.blocks:
                    rich_table.add_section()
                rich_table.add_row(*map(_rich, cells))
            console.print(rich_table)
            if table.floor:
                console.print(Text("below the line: the floor, the dense model with the same training"))
        console.print(Text(LEGEND), soft_wrap=True)
        console.print()
    for sentence in comparison.verdict:
        of_group = f"{comparison.groups[sentence.group].model}: " if len(comparison.groups) > 1 else ""
        console.print(Text(f"- {of_group}{sentence.text}"), soft_wrap=True)


def print_advice(found: Sequence[Advice], stdout: TextIO) -> None:
    """Print advice, model by model."""
    console = Console(file=stdout, highlight=False, width=None if stdout.isatty() else _FILE_WIDTH)
    for number, advice in enumerate(found):
        if number == 0 or advice.model != found[number - 1].model:
            console.print(Text(advice.model, style="bold"))
        console.print(Text(f"- {advice.topic}: {advice.text}"), soft_wrap=True)


def _rich(cell: Cell) -> Text:
    return Text(cell.marked, style="bold" if cell.best else "")

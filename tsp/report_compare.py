"""A comparison on the terminal: a table per group and budget, and the verdict in words."""

from collections.abc import Sequence
from typing import TextIO

from rich.table import Table as RichTable
from rich.text import Text

from tsp.advise import Advice
from tsp.compare.groups import Comparison
from tsp.compare.sheets import LEGEND, Cell, main_sheet
from tsp.console import console


def print_comparison(comparison: Comparison, stdout: TextIO) -> None:
    """Print all tables and the verdict."""
    out = console(stdout)
    for group in comparison.groups:
        out.print(Text(group.heading, style="bold"))
        dense = ", ".join(f"{corpus} {ppl:.4g}" for corpus, ppl in group.dense.items())
        out.print(Text(f"dense: {group.parameters:,} parameters, perplexity {dense}"))
        for table in group.tables:
            sheet = main_sheet(table, comparison.by)
            rich_table = RichTable(title=f"compared {table.heading}", title_justify="left")
            for heading, cell in zip(sheet.headings, sheet.rows[0], strict=True):
                rich_table.add_column(heading, justify="right" if cell.number else "left", overflow="fold")
            for place, cells in enumerate(sheet.rows):
                if place in sheet.blocks:
                    rich_table.add_section()
                rich_table.add_row(*map(_rich, cells))
            out.print(rich_table)
            if table.floor:
                out.print(Text("below the line: the floor, the dense model with the same training"))
        out.print(Text(LEGEND), soft_wrap=True)
        out.print()
    for sentence in comparison.verdict:
        of_group = f"{comparison.groups[sentence.group].model}: " if len(comparison.groups) > 1 else ""
        out.print(Text(f"- {of_group}{sentence.text}"), soft_wrap=True)


def print_advice(found: Sequence[Advice], stdout: TextIO) -> None:
    """Print advice, model by model."""
    out = console(stdout)
    for number, advice in enumerate(found):
        if number == 0 or advice.model != found[number - 1].model:
            out.print(Text(advice.model, style="bold"))
        out.print(Text(f"- {advice.topic}: {advice.text}"), soft_wrap=True)


def _rich(cell: Cell) -> Text:
    return Text(cell.marked, style="bold" if cell.best else "")

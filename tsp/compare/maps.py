"""Figures that are tables with shades: which layers went, and how much was lost on each slice of the text."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tsp.compare.canvas import new_figure, png
from tsp.figures import INK


def layer_map(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Methods downwards, layers to the right; a panel per number of layers dropped.

    Args:
        panels: by title, by method: the share of jobs that dropped each layer [L], in [0, 1].
    """
    heights = [len(rows) for rows in panels.values()]
    num_layers = max(len(shares) for rows in panels.values() for shares in rows.values())
    width_in = min(max(6.0, 2.0 + 0.33 * num_layers), 16.0)
    figure, plots = new_figure(1, len(panels), width_in, 0.8 * len(panels) + 0.3 * sum(heights) + 0.4, heights)
    for axes, (title, rows) in zip(plots, panels.items(), strict=True):
        axes.imshow(list(rows.values()), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for place, shares in enumerate(rows.values()):
            for layer, share in enumerate(shares):
                if 0 < share < 1:
                    colour = "white" if share > 0.55 else INK
                    axes.text(layer, place, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
        _cells(axes, len(rows), num_layers)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        stride = next(stride for stride in (1, 2, 5, 10, 20) if num_layers / stride <= 40)
        axes.set_xticks(range(0, num_layers, stride), map(str, range(0, num_layers, stride)), fontsize=8)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    plots[-1].set_xlabel("layer")
    return png(figure)


def heat_table(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> bytes:
    """Numbers from 1 up with shades behind them, on one scale; a cell without a number was not measured.

    Args:
        panels: by title, by row, by column.
    """
    names = list(dict.fromkeys(name for rows in panels.values() for values in rows.values() for name in values))
    top = max(1.1, *(value for rows in panels.values() for values in rows.values() for value in values.values()))
    heights = [len(rows) for rows in panels.values()]
    size_in = min(3.2 + 0.95 * len(names), 18.0), 0.9 + 0.4 * len(panels) + 0.27 * sum(heights)
    figure, plots = new_figure(1, len(panels), *size_in, heights)
    for axes, (title, rows) in zip(plots, panels.items(), strict=True):
        table = [[values.get(name, math.nan) for name in names] for values in rows.values()]
        axes.imshow(table, cmap="Greys", vmin=1.0, vmax=top, aspect="auto", interpolation="nearest")
        for (place, values), (column, _) in itertools.product(enumerate(table), enumerate(names)):
            if not math.isnan(values[column]):
                colour = "white" if (values[column] - 1) / (top - 1) > 0.55 else INK
                text = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
                axes.text(column, place, f"{values[column]:.2f}", **text)
        _cells(axes, len(rows), len(names))
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8.5)
        last = axes is plots[-1]
        axes.set_xticks(range(len(names)), names if last else [""] * len(names), fontsize=8, rotation=30, ha="right")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    return png(figure)


def _cells(axes: Any, num_rows: int, num_columns: int) -> None:
    """Thin lines between the cells."""
    axes.set_xticks([column - 0.5 for column in range(1, num_columns)], minor=True)
    axes.set_yticks([row - 0.5 for row in range(1, num_rows)], minor=True)
    axes.grid(which="minor", color="#b8bdc9", linewidth=0.6)
    axes.tick_params(which="both", length=0)

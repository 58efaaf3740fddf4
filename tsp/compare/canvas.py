"""An empty figure, and a drawn one as bytes. No global state of matplotlib is touched."""

import io
from collections.abc import Sequence
from typing import Any

from tsp.figures import DPI


def new_figure(
    columns: int,
    num_rows: int,
    width_in: float,
    height_in: float,
    heights: Sequence[float] | None = None,
    sharey: Any = False,
) -> tuple[Any, list[Any]]:
    """An empty figure with its plots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(num_rows, columns, squeeze=False, height_ratios=heights, sharey=sharey).flatten()
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(plots)


def png(figure: Any) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

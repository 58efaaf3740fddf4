"""How the figures of a comparison are drawn: points and numbers in, the bytes of a PNG out.

Marks and lines tell the first name of a series (the method), filling or a panel of its own the second (the transfer),
so that all is read in black and white too; colour only helps. No global state of matplotlib is touched.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsp.compare.canvas import new_figure, png
from tsp.figures import INK

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_FILLS = ("full", "none", "left", "top", "bottom")
# Okabe and Ito's palette: told apart with any kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B4A91", "#7A7A7A")
_LEVELS: tuple[Any, ...] = ((0, (4, 2)), (0, (1, 1)))
_LOG_FROM = 2.5
"""Largest over smallest value from which an axis of perplexities is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row of a table in a picture."""

    head: str
    tail: str
    panel: str
    x: float
    y: float
    spread: float = 0.0

    @property
    def name(self) -> str:
        """Of its series."""
        return f"{self.head} + {self.tail}" if self.tail else self.head


class _Style:
    """Mark, line and colour by head, filling by tail."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._heads = sorted({point.head for point in points})
        self._tails = sorted({point.tail for point in points})

    def mark(self, point: Point) -> dict[str, Any]:
        head = self._heads.index(point.head)
        return {
            "marker": _MARKS[head % len(_MARKS)],
            "fillstyle": _FILLS[self._tails.index(point.tail) % len(_FILLS)],
            "color": _COLOURS[head % len(_COLOURS)],
            "markerfacecoloralt": "white",
            "markersize": 7,
            "markeredgewidth": 1.2,
        }

    def line(self, point: Point) -> dict[str, Any]:
        return {"linestyle": _LINES[self._heads.index(point.head) % len(_LINES)], "linewidth": 1.3}


def lines(
    points: Sequence[Point],
    levels: Mapping[str, Mapping[str, float]],
    *,
    x_label: str,
    y_label: str,
    ticks: Mapping[int, str],
    log_x: bool = False,
) -> bytes:
    """A curve per head; below each other the panels, side by side the tails, all on one scale.

    Args:
        points: of all series and panels.
        levels: by panel, horizontal lines by name.
        x_label: of all panels.
        y_label: of the panels on the left; `{}` is the panel's name.
        ticks: labels of the x axis by position.
        log_x: logarithmic x axis.
    """
    style = _Style(points)
    panels = list(dict.fromkeys(point.panel for point in points))
    heads, tails = (sorted({getattr(point, part) for point in points}) for part in ("head", "tail"))
    size_in = max(3.1 * len(tails), 5.0) + 0.8, 2.9 * len(panels) + 0.7 + 0.25 * -(-len(heads) // 6)
    figure, plots = new_figure(len(tails), len(panels), *size_in, sharey="row")
    handles: dict[str, Any] = {}
    for axes, (panel, tail) in zip(plots, itertools.product(panels, tails), strict=True):
        shown = [point for point in points if (point.panel, point.tail) == (panel, tail)]
        handles = {**_curves(axes, shown, style), **handles}
        _draw_levels(axes, levels.get(panel, {}))
        if log_x:
            axes.set_xscale("log", base=2)
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.xaxis.minorticks_off()
        if panel == panels[-1]:
            axes.set_xlabel(x_label)
        if tail == tails[0]:
            _log_if_wide(axes, [point for point in points if point.panel == panel], "y")
            axes.set_ylabel(y_label.format(panel))
        axes.set_title(tail, loc="left", fontsize=10, color=INK)
        axes.grid(linewidth=0.4, alpha=0.6)
    ordered = sorted(handles)
    figure.legend(
        [handles[head] for head in ordered], ordered, loc="outside lower center", ncols=6, fontsize=9, frameon=False
    )
    return png(figure)


def _curves(axes: Any, points: Sequence[Point], style: _Style) -> dict[str, Any]:
    """Draw a curve per head; what stands for each in the legend."""
    drawn = {}
    for head in sorted({point.head for point in points}):
        series = sorted((point for point in points if point.head == head), key=lambda point: point.x)
        drawn[head] = axes.errorbar(
            [point.x for point in series],
            [point.y for point in series],
            yerr=[point.spread for point in series] if any(point.spread for point in series) else None,
            capsize=3,
            # The tail has a panel of its own.
            **(style.mark(series[0]) | {"fillstyle": "full"}),
            **style.line(series[0]),
        )
    return drawn


def dots(points: Sequence[Point], levels: Mapping[str, Mapping[str, float]]) -> bytes:
    """A line per series with its mark at its value, the best on top; a panel per corpus.

    Args:
        points: `y` counts.
        levels: by panel, vertical lines by name.
    """
    style, panels = _Style(points), list(dict.fromkeys(point.panel for point in points))
    order = [point.name for point in sorted(points, key=lambda point: -point.y) if point.panel == panels[0]]
    places = {name: place for place, name in enumerate(dict.fromkeys(order))}
    figure, plots = new_figure(len(panels), 1, 4.2 * len(panels) + 2.2, 1.5 + 0.3 * len(places))
    for axes, panel in zip(plots, panels, strict=True):
        shown = [point for point in points if point.panel == panel and point.name in places]
        for point in shown:
            mark = style.mark(point)
            axes.errorbar(point.y, places[point.name], xerr=point.spread or None, capsize=3, linestyle="none", **mark)
        for (name, value), line in zip(levels.get(panel, {}).items(), _LEVELS, strict=False):
            axes.axvline(value, color=INK, linewidth=1.0, linestyle=line, label=f"{name} {value:.4g}")
        _log_if_wide(axes, shown, "x")
        axes.set_yticks(list(places.values()), list(places) if axes is plots[0] else [""] * len(places))
        axes.set_ylim(-0.7, len(places) - 0.3)
        axes.set_xlabel(f"perplexity on {panel}")
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False)
    return png(figure)


def front(points: Sequence[Point], *, x_label: str, y_label: str) -> bytes:
    """Marks in a plane where right and down are better, and the front of those that nothing beats in both."""
    style = _Style(points)
    figure, (axes,) = new_figure(1, 1, 9.0, 5.0)
    for name in sorted({point.name for point in points}):
        series = [point for point in points if point.name == name]
        axes.plot(
            [p.x for p in series],
            [p.y for p in series],
            linestyle="none",
            label=name,
            zorder=3,
            **style.mark(series[0]),
        )
    dense = Point(head="dense", tail="", panel="", x=1.0, y=1.0)
    best = pareto([*points, dense])
    axes.plot([p.x for p in best], [p.y for p in best], color=INK, linewidth=1.0, zorder=2, label="Pareto front")
    white = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for point in best:
        text = f"{point.name}, {point.panel}" if point.panel else "dense"
        place = {"xytext": (0, -15), "textcoords": "offset points", "ha": "center", "zorder": 4}
        axes.annotate(text, (point.x, point.y), fontsize=8, color=INK, bbox=white, **place)
    axes.plot(1, 1, marker="+", markersize=11, color=INK, linestyle="none", label="dense")
    axes.margins(x=0.1, y=0.12)
    _log_if_wide(axes, points, "y")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(linewidth=0.4, alpha=0.6)
    figure.legend(loc="outside right upper", fontsize=8.5, frameon=False)
    return png(figure)


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other point equals or beats in both, from the slowest to the fastest."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.x, point.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best[::-1]


def _draw_levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Broken lines with their names at the edge."""
    along = axes.get_yaxis_transform()
    for (name, value), line, side in zip(levels.items(), _LEVELS, ("bottom", "top"), strict=False):
        axes.axhline(value, color=INK, linewidth=1.0, linestyle=line)
        place = {"transform": along, "ha": "right", "va": side}
        axes.text(1.0, value, f"{name} {value:.4g}", fontsize=8, color=INK, **place)


def _log_if_wide(axes: Any, points: Sequence[Point], axis: str) -> None:
    """A logarithmic axis with plain numbers where the values lie far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = [point.y for point in points]
    if max(values) / min(values) < _LOG_FROM:
        return
    getattr(axes, f"set_{axis}scale")("log")
    scale = getattr(axes, f"{axis}axis")
    scale.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if max(values) / min(values) < 30 else (1, 2, 5)))
    scale.set_major_formatter(StrMethodFormatter("{x:g}"))
    scale.set_minor_formatter(NullFormatter())

"""Which pictures a comparison has, and what stands in each; how they are drawn is `plots.py` and `maps.py`.

    for figure in draw(comparison, Path("figures")):
        print(figure.path, figure.title)

Every table of every group gets its own; a picture that would show nothing is not made.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tsp.compare import maps, plots
from tsp.compare.groups import Comparison, Group, Table
from tsp.compare.rows import Row, make_rows
from tsp.compare.verdict import TRANSFER, TWO_STAGE

TRAJECTORIES = "figures/gate_trajectories.png"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture on disk."""

    path: Path
    title: str
    caption: str
    """How to read it."""
    group: int
    """Index of the group."""
    budget_s: float | None


def draw(comparison: Comparison, folder: Path) -> list[Figure]:
    """Draw all figures of a comparison as PNG files.

    Args:
        comparison: from `groups.compare`.
        folder: made if it is missing; files of the same names are overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = [(number, group, table) for number, group in enumerate(comparison.groups) for table in group.tables]
    figures = []
    for count, (number, group, table) in enumerate(tables, start=1):
        suffix = f"-{count}" if len(tables) > 1 else ""
        for name, title, caption, content in _pictures(group, table):
            path = folder / f"{name}{suffix}.png"
            path.write_bytes(content)
            figures.append(Figure(path=path, title=title, caption=caption, group=number, budget_s=table.budget_s))
    return figures


_Picture = tuple[str, str, str, bytes]


def _pictures(group: Group, table: Table) -> Iterator[_Picture]:
    """Name, title, caption and content of each picture of a table."""
    if not table.rows:
        return
    # A model that diverged has no place on an axis; the tables and the map of layers have it.
    shown = replace(table, rows=[row for row in table.rows if math.isfinite(_worst(row))])
    if shown.rows:
        yield _perplexity(group, shown)
        for found in (_pareto(shown), _calibration(group, shown), _slices(group, shown)):
            if found is not None:
                yield found
    yield _layers(group, table)
    yield from _trajectories(table)


def _worst(row: Row) -> float:
    """Perplexity on the corpus that lost most, times dense."""
    return max(stat.mean for name, stat in row.stats.items() if name.startswith("ppl_ratio/"))


def _perplexity(group: Group, table: Table) -> _Picture:
    points = [
        plots.Point(
            head=_head(row),
            tail=_tail(row),
            panel=corpus,
            x=row.num_drop,
            y=row.stats[f"ppl/{corpus}"].mean,
            spread=row.stats[f"ppl/{corpus}"].spread or 0.0,
        )
        for corpus in group.corpora
        for row in table.rows
    ]
    floors = {
        corpus: min((row.stats[f"ppl/{corpus}"].mean for row in table.floor if row.transfer != "none"), default=None)
        for corpus in group.corpora
    }
    lines = {
        corpus: {"dense": dense} | ({"dense, same training": floor} if (floor := floors[corpus]) is not None else {})
        for corpus, dense in group.dense.items()
    }
    caption = (
        "Lower is better. Bars: standard deviation over the seeds. Broken lines: the dense model, as it is and trained."
    )
    if len({row.num_drop for row in table.rows}) == 1:
        title = f"Perplexity without {table.rows[0].num_drop} of {group.num_layers} layers"
        return "perplexity", title, caption, plots.dots(points, lines)
    ticks = {row.num_drop: f"{row.num_drop}\n{100 * row.ratio:.3g} %" for row in table.rows}
    content = plots.lines(points, lines, x_label="layers dropped", y_label="perplexity on {}", ticks=ticks)
    return "perplexity", "Perplexity against the number of layers dropped", caption, content


def _pareto(table: Table) -> _Picture | None:
    kinds = [kind for kind in ("generation", "prompt") if all(f"{kind}_speedup" in row.stats for row in table.rows)]
    if not kinds:
        return None
    # Models of one size are equally fast; what the clock found beyond that is noise, and would draw a false front.
    by_size: dict[float, list[float]] = {}
    for row in table.rows:
        by_size.setdefault(row.stats["parameters"].mean, []).append(row.stats[f"{kinds[0]}_speedup"].mean)
    points = [
        plots.Point(
            head=_head(row),
            tail=_tail(row),
            panel=str(row.num_drop),
            x=statistics.fmean(by_size[row.stats["parameters"].mean]),
            y=_worst(row),
        )
        for row in table.rows
    ]
    caption = (
        "To the right is faster, down is better. The line joins the rows that no other row beats in both (Pareto "
        "front), with their number of dropped layers. Speed is the mean over all rows with as many parameters."
    )
    content = plots.front(
        points, x_label=f"{kinds[0]} speed, times dense", y_label="perplexity, times dense (worst corpus)"
    )
    return "quality-speed", f"Quality against {kinds[0]} speed", caption, content


def _layers(group: Group, table: Table) -> _Picture:
    panels: dict[str, dict[str, list[float]]] = {}
    for num_drop in sorted({row.num_drop for row in table.rows}):
        rows = [row for row in table.rows if row.num_drop == num_drop]
        by_method: dict[str, list[list[int]]] = {}
        for row in rows:
            by_method.setdefault(row.method, []).extend(job.result["dropped"] for job in row.jobs)
        panels[f"{num_drop} of {group.num_layers} layers dropped"] = {
            method: [sum(layer in gone for gone in dropped) / len(dropped) for layer in range(group.num_layers)]
            for method, dropped in sorted(by_method.items())
        }
    caption = (
        "Black: dropped in all jobs of the method; grey with a figure: in so many percent of them (seeds, settings and "
        "transfers together)."
    )
    return "layers", "Which layers each method dropped", caption, maps.layer_map(panels)


def _calibration(group: Group, table: Table) -> _Picture | None:
    jobs = [job for row in table.rows for job in row.jobs]
    if len({(job.result.get("calibration") or {}).get("num_blocks") for job in jobs} - {None}) < 2:
        return None
    rows = make_rows(jobs, ("method", "transfer", "sequences"))
    corpus = next(iter(group.corpora))
    points = [
        plots.Point(
            head=row.method,
            tail=row.transfer,
            panel=f"{row.num_drop} of {group.num_layers} layers dropped",
            x=row.keys["sequences"],
            y=row.stats[f"ppl/{corpus}"].mean,
            spread=row.stats[f"ppl/{corpus}"].spread or 0.0,
        )
        for row in sorted(rows, key=lambda row: row.num_drop)
        if row.keys["sequences"] is not None
    ]
    dense = {point.panel: {"dense": group.dense[corpus]} for point in points}
    ticks = {int(point.x): str(int(point.x)) for point in points}
    content = plots.lines(
        points, dense, x_label="calibration sequences", y_label=f"perplexity on {corpus}\n{{}}", ticks=ticks, log_x=True
    )
    caption = "How much text a method needs. Lower is better; bars: standard deviation over the seeds."
    return "calibration", "Perplexity against the number of calibration sequences", caption, content


def _slices(group: Group, table: Table) -> _Picture | None:
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in table.rows:
        ratios: dict[str, list[float]] = {}
        for job in row.jobs:
            for corpus, slices in (job.result.get("slices") or {}).items():
                for name, measured in slices.items():
                    ppl = measured["ppl"]
                    if math.isfinite(ppl["pruned"]):
                        ratios.setdefault(f"{corpus}: {name}", []).append(ppl["pruned"] / ppl["dense"])
        if ratios:
            panel = panels.setdefault(f"{row.num_drop} of {group.num_layers} layers dropped", {})
            panel[row.label] = {name: statistics.fmean(of) for name, of in ratios.items()}
    if not panels:
        return None
    caption = "Perplexity on each slice of the text, times the dense model's; the darker, the more was lost there."
    return "slices", "Loss by slice of the text", caption, maps.heat_table(panels)


def _trajectories(table: Table) -> Iterator[_Picture]:
    """Of each selection by gates one picture per number of layers, from the job with the most to see."""
    seen: set[tuple[str, int]] = set()
    rows = [row for row in table.rows if row.method in TWO_STAGE]
    for row in sorted(rows, key=lambda row: row.transfer != TRANSFER):
        content = None if (row.method, row.num_drop) in seen else row.jobs[0].read(TRAJECTORIES)
        if content is not None:
            seen.add((row.method, row.num_drop))
            title = f"Gates of {row.label}, {row.num_drop} layers dropped"
            caption = f"Seed {row.jobs[0].result['seed']}. 1 is the dense model, 0 a bypassed layer."
            yield f"gates-{row.method}-{row.num_drop}", title, caption, content


def _head(row: Row) -> str:
    """The first of a row's names: it chooses the mark."""
    named = _names(row)
    return named[0] if named else "all"


def _tail(row: Row) -> str:
    """The other names: they choose the line."""
    return " ".join(_names(row)[1:])


def _names(row: Row) -> Sequence[str]:
    names = [str(value) for key, value in row.keys.items() if key not in ("num_drop", "ratio")]
    return names + [f"{key.rpartition('.')[2]}={value}" for key, value in row.differs.items()]

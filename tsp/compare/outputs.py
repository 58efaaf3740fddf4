"""A comparison as one JSON document, and as artifacts of the run of a sweep."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from tsp.compare.figures import draw
from tsp.compare.groups import Comparison, Group, Table
from tsp.compare.page import write_report
from tsp.compare.rows import Row
from tsp.records import write_json

SCHEMA = 1
FOLDER = "comparison"


class Tracker(Protocol):
    """The part of `tracking.run.Tracker` that is used here."""

    def artifact(self, path: Path, folder: str = "") -> None: ...


def as_document(comparison: Comparison) -> dict[str, Any]:
    """All of a comparison in plain values, for `--json`; what is infinite is null, as JSON knows no other word."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "experiment": comparison.experiment,
        "by": list(comparison.by),
        "groups": [_group(group) for group in comparison.groups],
        "verdict": [asdict(sentence) | {"text": sentence.text} for sentence in comparison.verdict],
    }
    return _finite(document)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log_comparison(comparison: Comparison, tracker: Tracker, folder: Path) -> None:
    """Log table, page and figures to a run, as artifacts below `comparison/`.

    Args:
        comparison: of the run's experiment.
        tracker: of a sweep's parent run.
        folder: where the files are written; made if it is missing.
    """
    figures = draw(comparison, folder)
    for figure in figures:
        tracker.artifact(figure.path, FOLDER)
    write_json(as_document(comparison), folder / "table.json")
    tracker.artifact(folder / "table.json", FOLDER)
    tracker.artifact(write_report(comparison, folder / "report.html", figures=figures), FOLDER)


def _group(group: Group) -> dict[str, Any]:
    return {
        "model": group.model,
        "revision": group.revision,
        "precision": group.precision,
        "num_layers": group.num_layers,
        "parameters": group.parameters,
        "corpora": group.corpora,
        "ppl_dense": group.dense,
        "tables": [_table(table) for table in group.tables],
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "heading": table.heading,
        "budget_s": table.budget_s,
        "rows": [_row(row) for row in table.rows],
        "floor": [_row(row) for row in table.floor],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "keys": row.keys,
        "method": row.method,
        "transfer": row.transfer,
        "num_drop": row.num_drop,
        "ratio": row.ratio,
        "chosen": row.chosen,
        "differs": row.differs,
        "seeds": [job.result["seed"] for job in row.jobs],
        "run_ids": [job.run_id for job in row.jobs],
        "dropped": [job.result["dropped"] for job in row.jobs],
        "measured": {name: asdict(stat) for name, stat in row.stats.items()},
        "best": sorted(row.best),
        "not_distinguishable_from_best": sorted(row.tied),
    }

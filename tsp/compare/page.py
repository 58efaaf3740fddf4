"""One self-contained HTML page of a comparison: no scripts, nothing is fetched, pictures stand in the file."""

import base64
import os
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tsp import __version__
from tsp.compare.figures import Figure, draw
from tsp.compare.groups import Comparison, Group, Table
from tsp.compare.rows import DEFAULTS, settings_of
from tsp.compare.sheets import LEGEND, cost_sheet, main_sheet, task_sheet
from tsp.errors import ConfigError
from tsp.tracking.results import FinishedJob

_TEMPLATE = Path(__file__).parent / "page.html.jinja"


def write_report(
    comparison: Comparison,
    path: Path,
    *,
    figures: Sequence[Figure] | None = None,
    price_per_hour: float | None = None,
    command: str = "",
) -> Path:
    """Write the page; the file appears whole or not at all.

    Args:
        comparison: from `groups.compare`.
        path: HTML file, replaced if it is there.
        figures: what `figures.draw` has made of this comparison; None: they are drawn for the page alone.
        price_per_hour: of one device, in any currency.
        command: that made the page.

    Returns:
        `path`.

    Raises:
        ConfigError: the file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="tsp-") as folder:
        drawn = draw(comparison, Path(folder)) if figures is None else figures
        text = render(comparison, drawn, price_per_hour=price_per_hour, command=command)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"--report {path} cannot be written: {error.strerror}") from None
    return path


def render(comparison: Comparison, figures: Sequence[Figure], *, price_per_hour: float | None, command: str) -> str:
    """The page's text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    groups = [
        _group(comparison, number, group, figures, price_per_hour) for number, group in enumerate(comparison.groups)
    ]
    return template.render(
        experiment=comparison.experiment,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        command=command,
        legend=LEGEND,
        groups=groups,
        num_jobs=sum(len(group.jobs) for group in comparison.groups),
    )


def _group(
    comparison: Comparison, number: int, group: Group, figures: Sequence[Figure], price_per_hour: float | None
) -> dict[str, Any]:
    tables = [
        {
            "heading": table.heading,
            "verdict": [
                sentence.text
                for sentence in comparison.verdict
                if sentence.group == number and sentence.budget_s == table.budget_s
            ],
            "main": main_sheet(table, comparison.by),
            "num_floor": len(table.floor),
            "tasks": task_sheet(table, comparison.by),
            "cost": cost_sheet(table, comparison.by, price_per_hour),
            "figures": [
                {"title": figure.title, "caption": figure.caption, "data": _data_uri(figure.path)}
                for figure in figures
                if figure.group == number and figure.budget_s == table.budget_s
            ],
        }
        for table in group.tables
    ]
    return {
        "heading": group.heading,
        "corpora": group.corpora,
        "dense": group.dense,
        "parameters": group.parameters,
        "tables": tables,
        "common": _common_settings(group.jobs),
        "versions": sorted({", ".join(f"{k} {v}" for k, v in job.versions.items()) for job in group.jobs}),
        "runs": [_run(job, group.jobs) for job in _in_order(group.tables)],
        "commands": list(dict.fromkeys(job.command for job in group.jobs if job.command)),
    }


def _in_order(tables: Sequence[Table]) -> list[FinishedJob]:
    return [job for table in tables for row in (*table.rows, *table.floor) for job in row.jobs]


def _run(job: FinishedJob, jobs: Sequence[FinishedJob]) -> dict[str, Any]:
    result, settings = job.result, settings_of(job)
    calibration = result.get("calibration") or {}
    varied = {key: settings[key] for key in _varied(jobs) if key in settings}
    return {
        "id": job.run_id,
        "link": job.link,
        "method": result["method"],
        "transfer": result["transfer"],
        "seed": result["seed"],
        "dropped": ", ".join(map(str, result["dropped"])) or "none",
        "calibration": f"{calibration['name']} {calibration['fingerprint']}" if calibration else "-",
        "settings": ", ".join(f"{key}={value}" for key, value in varied.items()),
        "started": datetime.fromtimestamp(job.started_ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def _varied(jobs: Sequence[FinishedJob]) -> list[str]:
    """Settings in which the jobs of a group differ, but for those that have a column of their own."""
    named = ("prune.method", "transfer", "seed")
    keys = dict.fromkeys(key for job in jobs for key in settings_of(job) if not key.startswith("tracking."))
    return [key for key in keys if key not in named and len({str(settings_of(job).get(key)) for job in jobs}) > 1]


def _common_settings(jobs: Sequence[FinishedJob]) -> dict[str, Any]:
    """What all jobs of a group have in common beside the defaults."""
    settings, varied = settings_of(jobs[0]), set(_varied(jobs))
    return {
        key: value
        for key, value in settings.items()
        if key not in varied and key not in ("prune.method", "transfer", "seed") and value != DEFAULTS.get(key)
    }


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

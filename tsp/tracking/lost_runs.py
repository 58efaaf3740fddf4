"""Runs that still are RUNNING in the store, though nobody writes them any more.

    for lost in lost_runs(Path.cwd(), silent_h=24):
        close(Path.cwd(), lost)

The watcher and `spool.sync` close the runs of a machine that is there. What is left are those of machines that are off
for good, and of stores that were moved; all that is known of such a run is how long it has been silent. A job samples
its machine's load every ten seconds, whatever else it does.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.tracking.existing import existing_store
from tsp.tracking.pages import search_pages
from tsp.tracking.results import KIND_TAG
from tsp.tracking.run import FAILURE_TAG, PARENT_TAG
from tsp.tracking.store import open_store, spool_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_HOUR_MS = 3_600_000


@dataclass(frozen=True, kw_only=True)
class LostRun:
    """A run that has been silent for too long."""

    run_id: str
    name: str
    experiment: str
    last_sign_ms: int
    """Since the epoch: its last metric, or its start; of a parent also those of its children."""
    silent_h: float

    def as_row(self) -> dict[str, Any]:
        """For a table or JSON."""
        return asdict(self)


def lost_runs(root: Path, *, silent_h: float) -> list[LostRun]:
    """Find them, in all experiments; only runs that tsp has started. Only reads.

    Args:
        root: working directory of the jobs; a run with a spool here is left to `spool.sync`.
        silent_h: hours without a sign of life.

    Raises:
        ConfigError: there is no store.
        TrackingError: it cannot be used.
    """
    client = _client(root)
    now_ms = time.time_ns() // 1_000_000
    names = {one.experiment_id: one.name for one in search_pages(client.search_experiments)}
    found = []
    for run in search_pages(client.search_runs, list(names), "attributes.status = 'RUNNING'"):
        if KIND_TAG not in run.data.tags or (spool_folder(root) / f"{run.info.run_id}.jsonl").exists():
            continue
        # A run that is young enough need not be looked at.
        last_ms = run.info.start_time
        if now_ms - last_ms > silent_h * _HOUR_MS:
            last_ms = _last_sign_ms(client, run)
        if now_ms - last_ms > silent_h * _HOUR_MS:
            found.append(
                LostRun(
                    run_id=run.info.run_id,
                    name=run.info.run_name,
                    experiment=names[run.info.experiment_id],
                    last_sign_ms=last_ms,
                    silent_h=(now_ms - last_ms) / _HOUR_MS,
                )
            )
    return found


def close(root: Path, lost: LostRun) -> None:
    """End it KILLED, at its last sign of life. A job that lives all the same sets its own status at its end."""
    client = _client(root)
    client.set_tag(lost.run_id, FAILURE_TAG, f"silent for {lost.silent_h:.0f} h")
    client.set_terminated(lost.run_id, "KILLED", lost.last_sign_ms)


def _last_sign_ms(client: "MlflowClient", run: "Run") -> int:
    run_id = run.info.run_id
    points = (client.get_metric_history(run_id, name) for name in run.data.metrics)
    children = search_pages(
        client.search_runs, [run.info.experiment_id], f"tags.`{PARENT_TAG}` = '{run_id}'", max_results=1000
    )
    return max(
        run.info.start_time,
        run.info.end_time or 0,
        *(point.timestamp for history in points for point in history),
        *(_last_sign_ms(client, child) for child in children),
    )


def _client(root: Path) -> "MlflowClient":
    from mlflow import MlflowClient

    uri = existing_store(root)
    open_store(uri, root)
    return MlflowClient(uri)

"""Find runs of ours in an experiment."""

from pathlib import Path
from typing import TYPE_CHECKING

from tsp.tracking.run import experiment_name
from tsp.tracking.store import open_store, resolve_uri

if TYPE_CHECKING:
    from mlflow.entities import Run

KIND_TAG = "tsp.kind"
"""`job`, or `sweep` for the parent run of many jobs."""


def runs_by_tag(root: Path, experiment: str | None, tag: str, *, status: str | None = None) -> dict[str, str]:
    """Run ids by the value of a tag; of several with the same value the newest.

    Args:
        root: working directory.
        experiment: name, as for `start_run`.
        tag: runs without it are left out.
        status: `FINISHED`, `FAILED`, ...; None: any.
    """
    runs = _runs(root, experiment_name(experiment), f"attributes.status = '{status}'" if status else "")
    return {run.data.tags[tag]: run.info.run_id for run in reversed(runs) if tag in run.data.tags}


def _runs(root: Path, experiment: str, condition: str) -> "list[Run]":
    """The newest first; none where there is no such experiment."""
    from mlflow import MlflowClient

    uri = resolve_uri(root)
    open_store(uri, root)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([found.experiment_id], condition, order_by=["start_time DESC"], page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs

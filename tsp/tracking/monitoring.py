"""Each look at a model in use is a run in `NAME/monitoring`; what it measured stands at the look's number as step.

    document = record(Path.cwd(), document, metrics, tags, started_ms=now_ms())

So MLflow's charts show the looks over time. What is measured, and what is asked of it, is not known here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.policy import Verdict
from tsp.tracking.links import links_of
from tsp.tracking.promotion import requirement_table
from tsp.tracking.refusals import refusals
from tsp.tracking.results import KIND_TAG
from tsp.tracking.spool import now_ms
from tsp.tracking.store import ensure_experiment, http_limits, open_store, resolve_uri, shown
from tsp.tracking.who import who

if TYPE_CHECKING:
    from mlflow import MlflowClient

MONITORING_KIND = "monitoring"
DOCUMENT_FILE = "monitoring.json"
STEP_TAG = "step"

_TIMEOUT_S = 60
_RETRIES = 3
"""What was measured for minutes is worth waiting for."""


def experiment_of(name: str) -> str:
    """The experiment of the looks at a registered model."""
    return f"{name}/monitoring"


def record(
    root: Path,
    name: str,
    document: Mapping[str, Any],
    *,
    metrics: Mapping[str, float],
    verdicts: list[Verdict],
    tags: Mapping[str, str],
    title: str,
    started_ms: int,
) -> dict[str, Any]:
    """Write a look down.

    Args:
        root: working directory; the embedded store is `mlruns/` below it.
        name: of the registered model.
        document: all of it, for `monitoring.json`.
        metrics: by their names in MLflow.
        verdicts: for `requirements.json`.
        tags: of the run.
        title: of the run.
        started_ms: when the look began, Unix time.

    Returns:
        The document, with `run_id`, `step` and `link`.

    Raises:
        TrackingError: the store does not take it.
    """
    from mlflow import MlflowClient

    uri = resolve_uri(root)
    open_store(uri, root)
    client = MlflowClient(uri)
    with (
        refusals(f"the look at {name} is not written down at {shown(uri)}"),
        http_limits(timeout_s=_TIMEOUT_S, retries=_RETRIES),
    ):
        experiment_id = ensure_experiment(client, experiment_of(name))
        step = _next_step(client, experiment_id)
        about = {KIND_TAG: MONITORING_KIND, STEP_TAG: str(step), "who": who()}
        run = client.create_run(experiment_id, start_time=started_ms, tags={**tags, **about}, run_name=title)
        run_id = run.info.run_id
        link = links_of(uri, experiment_id, run_id)["run"]
        whole = {**document, "run_id": run_id, "step": step, "link": link}
        _fill(client, run_id, whole, metrics, verdicts)
    return whole


def _next_step(client: "MlflowClient", experiment_id: str) -> int:
    """One after that of the newest look."""
    condition = f"tags.`{KIND_TAG}` = '{MONITORING_KIND}'"
    newest = client.search_runs([experiment_id], condition, order_by=["start_time DESC"], max_results=1)
    return int(newest[0].data.tags.get(STEP_TAG, "-1")) + 1 if newest else 0


def _fill(
    client: "MlflowClient",
    run_id: str,
    document: dict[str, Any],
    metrics: Mapping[str, float],
    verdicts: list[Verdict],
) -> None:
    """Everything into an open run, which ends here."""
    from mlflow.entities import Metric

    try:
        time_ms = now_ms()
        rows = [Metric(key, float(value), time_ms, document["step"]) for key, value in metrics.items()]
        client.log_batch(run_id, metrics=rows)
        client.log_dict(run_id, document, DOCUMENT_FILE)
        if verdicts:
            client.log_table(run_id, requirement_table(verdicts), "requirements.json")
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")

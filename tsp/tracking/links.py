"""Where a run is in MLflow's web UI."""

from tsp.tracking.store import shown


def links_of(uri: str, experiment_id: str, run_id: str, base_url: str | None = None) -> dict[str, str]:
    """Where to look at a run.

    Args:
        uri: tracking URI of its store.
        experiment_id: of its experiment.
        run_id: the run.
        base_url: address of the UI; default: the tracking server, or port 5000 here for the embedded store.

    Returns:
        `run`, `metrics`, `artifacts`, `experiment`: addresses that open the model-training view, not the GenAI one.
    """
    base = (base_url or (shown(uri) if uri.startswith("http") else "http://127.0.0.1:5000")).rstrip("/")
    experiment = f"{base}/#/experiments/{experiment_id}/runs"
    view = "?workflowType=machine_learning"
    return {
        "run": f"{experiment}/{run_id}{view}",
        "metrics": f"{experiment}/{run_id}/model-metrics{view}",
        "artifacts": f"{experiment}/{run_id}/artifacts{view}",
        "experiment": f"{experiment}{view}",
    }

"""Runs of a job that did not finish, as the store knows them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsp.errors import ConfigError, TrackingError
from tsp.tracking.results import search_runs
from tsp.tracking.run import experiment_name
from tsp.tracking.store import find_run, open_store, resolve_uri

if TYPE_CHECKING:
    from mlflow.entities import Run

JOB_HASH = "job_hash"
"""Tag by which the runs of the same job are known."""
OUTPUT_TAG = "tsp.output"
"""Tag with the folder of a job."""
RESUMED_TAG = "tsp.resumed"
"""Tag of a run that was gone on with: its seconds are those since then, of the selection those before, too."""


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """A run that can be gone on with."""

    run_id: str
    output: Path


def named_run(root: Path, run_id: str, job_hash: str) -> EarlierRun:
    """The run of an id, if it is an unfinished one of the same job.

    Args:
        root: working directory.
        run_id: of MLflow.
        job_hash: of `job.Job.hash`.

    Raises:
        ConfigError: there is none of that id, it is finished, or of another job.
        TrackingError: the store does not answer.
    """
    from mlflow import MlflowClient

    uri = resolve_uri(root)
    open_store(uri, root)
    try:
        run = find_run(MlflowClient(uri), run_id)
    except TrackingError as error:
        raise ConfigError(f"--resume: {error}") from None
    if run.info.status == "FINISHED":
        raise ConfigError(f"--resume {run_id}: that run is finished; leave --resume out to run the job once more")
    if run.data.tags.get(JOB_HASH) != job_hash:
        raise ConfigError(
            f"--resume {run_id}: that run is another job; give the same settings, model files and texts as in its "
            "artifacts config.yaml and command.txt"
        )
    return _as_earlier(root, run)


def latest_run(root: Path, experiment: str | None, job_hash: str, output: Path | None) -> EarlierRun | None:
    """The newest unfinished run of the same job; None: there is none.

    Args:
        root: working directory.
        experiment: name, as for `start_run`.
        job_hash: of `job.Job.hash`.
        output: only with this folder; None: any.

    Raises:
        TrackingError: the store does not answer.
    """
    condition = f"tags.{JOB_HASH} = '{job_hash}' and attributes.status != 'FINISHED'"
    found = (_as_earlier(root, run) for run in search_runs(root, experiment_name(experiment), condition))
    return next((run for run in found if output is None or run.output == output.absolute()), None)


def _as_earlier(root: Path, run: "Run") -> EarlierRun:
    # One that was killed before it could say so has the usual folder.
    usual = root.absolute() / "mlruns" / "output" / run.info.run_id
    return EarlierRun(run_id=run.info.run_id, output=Path(run.data.tags.get(OUTPUT_TAG, usual)))

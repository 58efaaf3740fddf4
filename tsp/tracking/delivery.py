"""From spooled records to MLflow calls. Every call here may be repeated without harm.

`deliver` raises when MLflow is away, and then the same records are given to it again later. What MLflow refuses for
good (a parameter that would change its value, say) is left out with a warning, lest it dam up what stands behind it.
A run that is not ours to write any more keeps all of its records: rights come back.

Records are dicts with a `kind`: `metrics` (values, step, time_ms), `params`, `tags` (values), `artifact` (file,
folder), `image` (file, key, step, time_ms), `dataset` (name, digest, source_type, source, context), `registration`
(checkpoint, name, tags, description, metadata), `status` (status, time_ms).
"""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.errors import ModelError, TrackingError
from tsp.masking import masked
from tsp.tracking.registry import register_checkpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
"""Both are limits of MLflow's `log_batch`; tags have that of the params."""

Record = dict[str, Any]


def deliver(client: "MlflowClient", run_id: str, records: Sequence[Record], files: Path) -> None:
    """Send records to MLflow, in order, metrics in batches.

    Args:
        client: connected to the store of the run.
        run_id: the run that gets them.
        records: as in the head of this module.
        files: folder with the files that artifact and image records name.

    Raises:
        MlflowException: MLflow is away or broken; try again later.
        TrackingError: the run was deleted.
    """
    for kind, group in itertools.groupby(records, key=lambda record: record["kind"]):
        batch = list(group)
        if kind in ("metrics", "params", "tags"):
            size = METRICS_PER_CALL if kind == "metrics" else PARAMS_PER_CALL
            entities = _entities(kind, batch)
            for start in range(0, len(entities), size):
                _log_batch(client, run_id, kind, entities[start : start + size])
        else:
            for record in batch:
                _deliver_one(client, run_id, kind, record, files)


def _entities(kind: str, batch: list[Record]) -> list[Any]:
    """MLflow's objects for the values of some records of one kind."""
    from mlflow.entities import Metric, Param, RunTag

    if kind == "metrics":
        return [
            Metric(key, value, record["time_ms"], record["step"])
            for record in batch
            for key, value in record["values"].items()
        ]
    entity = Param if kind == "params" else RunTag
    # The last value of a key counts: MLflow refuses a call that names a key twice.
    return [entity(key, value) for key, value in {k: v for r in batch for k, v in r["values"].items()}.items()]


def _log_batch(client: "MlflowClient", run_id: str, kind: str, entities: list[Any]) -> None:
    """One `log_batch`; if MLflow refuses it for good, halve it until only the culprits are left out."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, **{kind: entities}, synchronous=True)
    except MlflowException as error:
        if not _is_refusal(error):
            raise
        _require_active(client, run_id)
        if len(entities) == 1:
            log.warning("MLflow refuses %s %r: %s", kind.rstrip("s"), entities[0].key, _first_line(error))
            return
        middle = len(entities) // 2
        _log_batch(client, run_id, kind, entities[:middle])
        _log_batch(client, run_id, kind, entities[middle:])


def _deliver_one(client: "MlflowClient", run_id: str, kind: str, record: Record, files: Path) -> None:
    """Send a record that has a call of its own."""
    from mlflow.exceptions import MlflowException

    path = files / record.get("file", "")
    if not path.exists() and "file" in record:  # Delivered before; only the note of it was lost.
        return
    try:
        if kind == "artifact":
            client.log_artifact(run_id, str(path), record["folder"] or None)
        elif kind == "image":
            _log_image(client, run_id, record, path)
        elif kind == "dataset":
            _log_dataset(client, run_id, record)
        elif kind == "registration":
            _register(client, run_id, record)
        elif kind == "status":
            _set_status(client, run_id, record)
    except (MlflowException, OSError, ValueError) as error:
        if not isinstance(error, ValueError) and not _is_refusal(error):
            raise
        _require_active(client, run_id)
        log.warning("MLflow refuses the %s %s: %s", kind, record, _first_line(error))
    if "file" in record:
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def _log_image(client: "MlflowClient", run_id: str, record: Record, path: Path) -> None:
    import PIL.Image

    # `log_image` puts a random id into the name. The compressed copy comes last: where it is, all was delivered.
    mark = f"+step+{record['step']}+timestamp+{record['time_ms']}+"
    name = record["key"].rpartition("/")[2]
    there = (Path(info.path).name for info in client.list_artifacts(run_id, "images"))
    if any(mark in file and f"{name}{mark}" in file and "+compressed" in file for file in there):
        return
    try:
        with PIL.Image.open(path) as image:
            image.load()
    except PIL.UnidentifiedImageError as error:
        raise ValueError("not a picture") from error
    client.log_image(
        run_id, image, key=record["key"], step=record["step"], timestamp=record["time_ms"], synchronous=True
    )


def _log_dataset(client: "MlflowClient", run_id: str, record: Record) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(record["name"], record["digest"], record["source_type"], record["source"])
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])])


def _register(client: "MlflowClient", run_id: str, record: Record) -> None:
    wanted = {key: record[key] for key in ("name", "tags", "description", "metadata")}
    try:
        register_checkpoint(client.tracking_uri, Path(record["checkpoint"]), run_id=run_id, **wanted)
    except ModelError as error:
        raise ValueError(str(error)) from error  # The folder is gone.
    except TrackingError as error:
        if _is_refusal(error.__cause__) or _is_forbidden(error.__cause__):
            # Another's model, which has nothing to do with the run: that is ours, and ends.
            raise ValueError(str(error)) from error
        raise


def _is_refusal(error: BaseException | None) -> bool:
    """Whether it would be the same the next time: a name is not taken, a file is too large."""
    response = getattr(error, "response", None)
    if response is not None:
        # Files go by plain HTTP, past a proxy perhaps. 401, 403, 408, 429: the password, a right, the time, the rate.
        return 400 <= response.status_code < 500 and response.status_code not in (401, 403, 408, 429)
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def _is_forbidden(error: BaseException | None) -> bool:
    """Whether a right is lacking."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status == 403 or getattr(error, "error_code", None) == "PERMISSION_DENIED"


def _set_status(client: "MlflowClient", run_id: str, record: Record) -> None:
    if record["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, record["status"], record["time_ms"])


def _require_active(client: "MlflowClient", run_id: str) -> None:
    """A deleted run refuses everything; that is no fault of the records, which are kept in case it is restored."""
    if client.get_run(run_id).info.lifecycle_stage != "active":
        raise TrackingError(f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` brings it back")


def _first_line(error: Exception) -> str:
    return masked(str(error)).partition("\n")[0][:300]

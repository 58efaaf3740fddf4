"""The tracker: the one object through which a job writes to its MLflow run.

    tracker = start_run(Path.cwd(), experiment="demo", run_name=None, tags={"method": "tsp"}, params={"seed": 0})
    tracker.metrics({"stage1/loss/total": 2.5}, step=7)
    tracker.artifact(Path("out/result.json"))
    tracker.finish("FINISHED")

No verb waits for MLflow or raises because of it: each appends to the spool (`spool.py`). Only `start_run` talks to the
store itself, and fails fast. Off rank 0, and with tracking turned off, the job holds a `NullTracker`. The job calls
`finish` however it ends; if it cannot, the watcher (`watcher.py`) does it. Texts go out with their credentials masked,
files as they are.
"""

import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.errors import ConfigError, TrackingError
from tsp.masking import masked
from tsp.tracking.links import links_of
from tsp.tracking.null import NullTracker, Status
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.spool import Spool, now_ms
from tsp.tracking.store import ensure_experiment, find_run, open_store, resolve_uri, shown, spool_folder
from tsp.tracking.system_metrics import SystemMetrics
from tsp.tracking.told import last_steps
from tsp.tracking.watcher import Watcher

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

__all__ = ["NullTracker", "Tracker", "start_run"]

DEFAULT_EXPERIMENT = "tsp"
FAILURE_TAG = "tsp.failure"
PARENT_TAG = "mlflow.parentRunId"
DRAIN_S = 60.0
"""How long `finish` waits for MLflow to take what is left in the spool."""

KEY_LENGTH = 250
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
DIGEST_LENGTH = 36
"""What MLflow cuts or refuses; it counts characters."""


class Tracker:
    """An open run. Made by `start_run`."""

    def __init__(self, root: Path, uri: str, run: "Run", experiment: str, *, owns_run: bool) -> None:
        """Attach to a run that exists.

        Args:
            root: working directory of the job.
            uri: tracking URI.
            run: the run, as MLflow has it.
            experiment: name of its experiment.
            owns_run: whether the status is ours to set.
        """
        self.run_id: str = run.info.run_id
        self.run_name: str = run.info.run_name
        self.experiment = experiment
        self.experiment_id: str = run.info.experiment_id
        self.uri = uri
        self._owns_run = owns_run
        self._open = True
        self._told: dict[str, int] = {}
        self._spool = Spool(spool_folder(root), self.run_id, uri, owns_run=owns_run)
        self._watcher = Watcher(self.run_id, spool_folder(root)) if owns_run else None
        self._system_metrics = SystemMetrics(self.metrics, run.info.start_time)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of one step. Keys are grouped in the charts by all that stands before the last slash."""
        named = {_key(name): float(value) for name, value in values.items()}
        numbers = {key: value for key, value in named.items() if step > self._told.get(key, -1)}
        if numbers:
            self._spool.append({"kind": "metrics", "values": numbers, "step": int(step), "time_ms": now_ms()})

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings, flat. A param cannot be changed once it is logged; values are cut at 6,000 characters."""
        self._spool.append(
            {"kind": "params", "values": {_key(k): masked(str(v))[:PARAM_LENGTH] for k, v in values.items()}}
        )

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; a tag that is set again changes its value."""
        self._spool.append(
            {"kind": "tags", "values": {_key(k): masked(str(v))[:TAG_LENGTH] for k, v in values.items()}}
        )

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a file as it is now, under its own name, into a folder of the run's artifacts."""
        copy = self._spool.place(Path(path).name)
        shutil.copyfile(path, copy)
        self._append_file("artifact", copy, folder=folder)

    def text(self, content: str, name: str) -> None:
        """Log text as a file, `name` with or without folders: `config/resolved.yaml`."""
        folder, _, file_name = name.rpartition("/")
        copy = self._spool.place(file_name)
        copy.write_text(masked(content), encoding="utf-8")
        self._append_file("artifact", copy, folder=folder)

    def image(self, image: "Path | np.ndarray", key: str, step: int) -> None:
        """Log a picture of a series that MLflow shows with a step slider.

        Args:
            image: a file, or an array of shape [height, width, 3], uint8 or float in [0, 1].
            key: name of the series.
            step: position in the series.
        """
        copy = self._spool.place("image.png")
        if isinstance(image, (str, Path)):
            shutil.copyfile(image, copy)
        else:
            import PIL.Image

            pixels_HWC = image if image.dtype == "uint8" else (image * 255).round().astype("uint8")
            PIL.Image.fromarray(pixels_HWC).save(copy)
        self._append_file("image", copy, key=_key(key).replace(":", "_"), step=int(step), time_ms=now_ms())

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Log a corpus as an input of the run.

        Args:
            name: the corpus as it is called in the metrics.
            digest: fingerprint; the first 36 characters are kept.
            source: path, URL, hub id, or a word for something generated.
            context: what it was used for: `calibration`, `evaluation`.
        """
        source_type, description = _describe_source(source)
        self._spool.append(
            {
                "kind": "dataset",
                "name": masked(name),
                "digest": digest[:DIGEST_LENGTH],
                "source_type": source_type,
                "source": masked(json.dumps(description)),
                "context": context,
            }
        )

    def register(
        self, checkpoint: Path, name: str, *, tags: Mapping[str, str], description: str, metadata: dict[str, Any]
    ) -> str | None:
        """Register the checkpoint as the model that this run has made; see `registry.register_checkpoint`.

        Returns:
            The version; None: MLflow is away, and it is made when the spool is delivered (`tsp sync`), from the folder
            as it is then.
        """
        wanted: dict[str, Any] = {"name": name, "tags": dict(tags), "description": description, "metadata": metadata}
        try:
            return register_checkpoint(self.uri, checkpoint, run_id=self.run_id, **wanted)[1]
        except TrackingError as error:
            log.warning("the model is not registered yet, `tsp sync` will do it: %s", error)
            self._spool.append({"kind": "registration", "checkpoint": str(checkpoint.absolute()), **wanted})
            return None

    def finish(self, status: Status, reason: str | None = None) -> None:
        """Deliver all, and set the final status, unless the run was given to us. Only the first call counts.

        Args:
            status: how the job ended.
            reason: why it failed, kept as tag `tsp.failure`.
        """
        if not self._open:
            return
        self._open = False
        self._system_metrics.stop()
        if reason is not None:
            self.tags({FAILURE_TAG: reason})
        if self._owns_run:
            self._spool.append({"kind": "status", "status": status, "time_ms": now_ms()})
        delivered = self._spool.close(DRAIN_S)
        if self._watcher is not None:
            self._watcher.close(delivered=delivered)

    def links(self, base_url: str | None = None) -> dict[str, str]:
        """Where to look at the run in the web UI, see `links_of`."""
        return links_of(self.uri, self.experiment_id, self.run_id, base_url)

    def _go_on(self, client: "MlflowClient", *, replays: bool) -> None:
        """The run is RUNNING again, and has not failed."""
        owed = self._spool.owed()  # Before the run is read: what is delivered meanwhile is in one of them.
        run = client.get_run(self.run_id)
        if replays:
            self._told = last_steps(run, owed)
        self._spool.append({"kind": "status", "status": "RUNNING", "time_ms": now_ms()})
        self.tags({FAILURE_TAG: ""})

    def _append_file(self, kind: str, copy: Path, **fields: Any) -> None:
        self._spool.append({"kind": kind, "file": str(copy.relative_to(self._spool.files)), **fields})


def start_run(
    root: Path,
    *,
    experiment: str | None,
    run_name: str | None,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    resume: str | None = None,
    replays: bool = False,
    parent: str | None = None,
) -> Tracker:
    """Open the store and a run in it. Call it on rank 0 only.

    `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` and `MLFLOW_TAGS` (a JSON object) are honoured, an explicit argument
    wins. A run named by `MLFLOW_RUN_ID` is continued and not closed by us.

    Args:
        root: working directory of the job; the embedded store is `mlruns/` below it.
        experiment: name; None: from the environment, else `tsp`.
        run_name: None: MLflow makes one up.
        tags: added to mlflow's usual ones (user, source, git commit).
        params: flat settings.
        resume: id of a run of ours to go on with; it is RUNNING again, and closed by us.
        replays: what goes on does again what it has done: points that the run has are not told once more.
        parent: id of the run that this one is a child of; a run given by `MLFLOW_RUN_ID` is then the parent's.

    Raises:
        TrackingError: the store or the run cannot be used.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.context.registry import resolve_tags

    uri = resolve_uri(root)
    all_tags = {**_tags_from_environment(), **tags, **({PARENT_TAG: parent} if parent else {})}
    open_store(uri, root)
    client = MlflowClient(uri)
    given = None if parent else os.environ.get("MLFLOW_RUN_ID")
    try:
        if resume or given:
            run = find_run(client, str(resume or given))
        else:
            experiment_id = ensure_experiment(client, experiment_name(experiment))
            # The address of a git repository may have a token in it.
            usual_tags = {key: masked(value) for key, value in resolve_tags().items()}
            run = client.create_run(experiment_id, tags=usual_tags, run_name=run_name and masked(run_name))
        held_by = client.get_experiment(run.info.experiment_id).name
    except MlflowException as error:
        raise TrackingError(f"no run can be opened at {shown(uri)}: {error}") from error
    tracker = Tracker(root, uri, run, held_by, owns_run=bool(resume) or not given)
    if resume:
        tracker._go_on(client, replays=replays)
    tracker.tags(all_tags)
    tracker.params(params)
    return tracker


def experiment_name(given: str | None) -> str:
    """What is given, else what the environment says, else `tsp`; without credentials."""
    return masked(given or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT)


def _tags_from_environment() -> dict[str, str]:
    """`MLFLOW_TAGS`, a JSON object, as the Hugging Face Trainer reads it too."""
    text = os.environ.get("MLFLOW_TAGS", "").strip()
    if not text:
        return {}
    try:
        tags = json.loads(text)
    except ValueError:
        tags = None
    if not isinstance(tags, dict):
        raise ConfigError(f"""MLFLOW_TAGS must be a JSON object like {{"team": "x"}}, got {text!r}""")
    return {str(key): str(value) for key, value in tags.items()}


@functools.lru_cache(maxsize=4096)  # The same few hundred names come at every step.
def _key(name: str) -> str:
    """The name with what MLflow does not allow in keys replaced by `_`."""
    return re.sub(r"[^\w.\- :/]", "_", name)[:KEY_LENGTH]


def _describe_source(source: str) -> tuple[str, dict[str, Any]]:
    """MLflow's type and description of where a corpus comes from."""
    if source.startswith(("http://", "https://")):
        return "http", {"url": source}
    if Path(source).exists():
        return "local", {"uri": str(Path(source).resolve())}
    if "/" in source:
        return "hugging_face", {"path": source}
    return "code", {"tags": {"mlflow.source.name": source}}

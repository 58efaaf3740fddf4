"""Registered models as they stand in the registry: their versions, aliases, and what was measured of each.

    with registry(Path.cwd()) as client:
        version = find_version(client, "demo-pruned", "champion")
        evidence = evidence_of(client, version)

What the measurements mean is not known here. Aliases move in `tsp/tracking/promotion.py`.
"""

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.errors import ModelError
from tsp.tracking.existing import existing_store
from tsp.tracking.links import links_of
from tsp.tracking.lock import LOCK
from tsp.tracking.pages import search_pages
from tsp.tracking.refusals import refusals
from tsp.tracking.registry import default_store
from tsp.tracking.results import KIND_TAG, artifact_reader
from tsp.tracking.store import ensure_experiment, open_store, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

EVALUATION_KIND = "evaluation"
EVALUATION_FILE = "evaluation.json"

_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One measurement of a version."""

    run_id: str
    document: Mapping[str, Any]
    """`result.json` of the job that made it, or what `tsp evaluate` says of it."""


@contextmanager
def registry(root: Path) -> "Iterator[MlflowClient]":
    """The registry of a folder's store.

    Args:
        root: working directory of the jobs.

    Raises:
        ConfigError: there is no store yet.
        TrackingError: it cannot be used, or something in the block was refused by it.
    """
    uri = existing_store(root)
    # A bar for each of many small files would be all that is seen.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    open_store(uri, root)
    with refusals(f"the registry at {shown(uri)} refuses"), default_store(uri):
        yield MlflowClient(uri)


def model_names(client: "MlflowClient") -> list[str]:
    """All registered models; the locks of promotions are none."""
    names = (model.name for model in search_pages(client.search_registered_models))
    return sorted(name for name in names if not name.endswith(LOCK))


def find_version(client: "MlflowClient", name: str, wanted: str | None) -> "ModelVersion":
    """A version by its number or an alias; None: the newest.

    Raises:
        ModelError: no such model, version or alias.
    """
    versions = versions_of(client, name)
    if wanted is None:
        return versions[-1]
    found = next((version for version in versions if wanted == str(version.version) or wanted in version.aliases), None)
    if found is None:
        aliases = (f"@{alias}" for version in versions for alias in version.aliases)
        there = [*aliases, *(str(version.version) for version in versions)]
        raise ModelError(f"{name} has no version or alias {wanted!r}; it has {_some(there)}")
    return found


def versions_of(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    """All versions of a model with their aliases, the oldest first; at least one.

    Raises:
        ModelError: no such model, or it has no version.
    """
    known = model_names(client)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ModelError(f"no registered model {name!r}; {hint}there are {_some(known)}")
    aliases: dict[str, list[str]] = {}
    for alias, number in client.get_registered_model(name).aliases.items():
        aliases.setdefault(str(number), []).append(alias)
    versions = sorted(
        search_pages(client.search_model_versions, f"name = '{name}'"), key=lambda version: int(version.version)
    )
    if not versions:
        raise ModelError(f"registered model {name!r} has no version")
    for version in versions:
        # Searching leaves them out in some stores.
        version.aliases[:] = sorted(aliases.get(str(version.version), []))
    return versions


def evidence_of(client: "MlflowClient", version: "ModelVersion") -> list[Evidence]:
    """All that was measured of a version, the oldest first; none for one that no job of ours has made."""
    from mlflow.exceptions import MlflowException

    found = []
    if version.run_id:
        try:
            found += _read(client, version.run_id, "result.json")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    experiment = client.get_experiment_by_name(evaluations_of(version.name))
    if experiment is not None:
        condition = f"tags.`{KIND_TAG}` = '{EVALUATION_KIND}' and tags.version = '{version.version}'"
        runs: Iterator[Run] = search_pages(
            client.search_runs, [experiment.experiment_id], condition, order_by=["start_time ASC"]
        )
        for run in runs:
            found += _read(client, run.info.run_id, EVALUATION_FILE)
    return found


def record_evaluation(
    client: "MlflowClient", version: "ModelVersion", document: dict[str, Any], values: Mapping[str, float]
) -> str:
    """Keep a later measurement of a version as a run in `NAME/evaluations`.

    Args:
        client: of the registry's store.
        version: what was measured.
        document: what `tsp evaluate` says.
        values: logged as metrics.

    Returns:
        The run's id.
    """
    experiment_id = ensure_experiment(client, evaluations_of(version.name))
    tags = {KIND_TAG: EVALUATION_KIND, "model": version.name, "version": str(version.version)}
    title = f"version {version.version} on {', '.join(document['corpora'])}"
    run_id = client.create_run(experiment_id, run_name=title, tags=tags).info.run_id
    try:
        client.log_dict(run_id, document, EVALUATION_FILE)
        for name, value in values.items():
            client.log_metric(run_id, name, value)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return run_id


def run_link(client: "MlflowClient", run_id: str) -> str | None:
    """The page of a run; None: it is gone."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return links_of(client.tracking_uri, run.info.experiment_id, run_id)["run"]


def evaluations_of(name: str) -> str:
    """The experiment of a model's later measurements."""
    return f"{name}/evaluations"


def _read(client: "MlflowClient", run_id: str, file: str) -> list[Evidence]:
    content = artifact_reader(client, run_id)(file)
    return [] if content is None else [Evidence(run_id=run_id, document=json.loads(content))]


def _some(names: Sequence[str]) -> str:
    """The first of them, for an error of one line."""
    more = len(names) - _NAMED
    return (", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")) or "none"

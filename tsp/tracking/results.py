"""Find runs of ours in an experiment, and read what the finished jobs among them have found.

    for job in finished_jobs(Path.cwd(), "demo"):
        print(job.result["method"], job.result["perplexity"])

Results are read as they are in the store; what they mean, and how they are compared, is not known here.
"""

import difflib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.config import flatten
from tsp.errors import ConfigError
from tsp.tracking.existing import existing_store
from tsp.tracking.links import links_of
from tsp.tracking.pages import search_pages
from tsp.tracking.refusals import refusals
from tsp.tracking.run import experiment_name
from tsp.tracking.store import open_store, resolve_uri, shown
from tsp.yaml12 import parse_yaml

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("tsp")

KIND_TAG = "tsp.kind"
"""`job`, or `sweep` for the parent run of many jobs; `trial` and `tune` for those of `tsp tune`."""


@dataclass(frozen=True, kw_only=True)
class FinishedJob:
    """What the store knows of a job that is done."""

    run_id: str
    name: str
    started_ms: int
    result: dict[str, Any]
    """`result.json`. Of a job of an earlier release `settings`, `seed`, `num_drop` and `corpora` are filled in from
    what else its run holds; other keys that it lacks were not measured."""
    window_losses: Mapping[str, tuple[float, ...]]
    """By corpus: mean cross-entropy of the pruned model on each window, nats per token."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """By package."""
    command: str = ""
    link: str = ""
    """The run in MLflow's UI."""
    read: Callable[[str], bytes | None] = field(default=lambda path: None, repr=False, compare=False)
    """Content of another artifact of the run; None: there is none of that name."""


def finished_jobs(root: Path, experiment: str | None) -> list[FinishedJob]:
    """All finished jobs of an experiment, the oldest first; parent runs of sweeps are not among them.

    Args:
        root: working directory; the embedded store is `mlruns/` below it.
        experiment: name; None: as for `start_run`.

    Raises:
        ConfigError: no store, no such experiment, or no finished job in it.
        TrackingError: the store cannot be used.
    """
    # A bar for each of hundreds of small files would be all that is seen.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    name = experiment_name(experiment)
    uri = existing_store(root)
    from mlflow import MlflowClient

    open_store(uri, root)
    client = MlflowClient(uri)
    with refusals(f"experiment {name!r} cannot be read at {shown(uri)}"):
        _require_experiment(client, name)
        runs = search_runs(root, name, "")
        done = [run for run in reversed(runs) if run.info.status == "FINISHED" and _is_job(run)]
        read = [_finished_job(client, run) for run in done]
    jobs = [job for job in read if job is not None]
    if len(jobs) < len(done):
        log.warning("%d finished runs of %s have no result.json and are left out", len(done) - len(jobs), name)
    if not jobs:
        states = [run.info.status.lower() for run in runs]
        counted = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states))) or "none at all"
        raise ConfigError(f"experiment {name!r} has no finished job to compare (its runs: {counted})")
    return jobs


def runs_by_tag(root: Path, experiment: str | None, tag: str, *, status: str | None = None) -> dict[str, str]:
    """Run ids by the value of a tag; of several with the same value the newest.

    Args:
        root: working directory.
        experiment: name, as for `start_run`.
        tag: runs without it are left out.
        status: `FINISHED`, `FAILED`, ...; None: any.
    """
    runs = search_runs(root, experiment_name(experiment), f"attributes.status = '{status}'" if status else "")
    return {run.data.tags[tag]: run.info.run_id for run in reversed(runs) if tag in run.data.tags}


def search_runs(root: Path, experiment: str, condition: str) -> "list[Run]":
    """The newest first; none where there is no such experiment."""
    from mlflow import MlflowClient

    uri = resolve_uri(root)
    open_store(uri, root)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    return list(search_pages(client.search_runs, [found.experiment_id], condition, order_by=["start_time DESC"]))


def _is_job(run: "Run") -> bool:
    return run.data.tags.get(KIND_TAG, "job") == "job"


def _require_experiment(client: "MlflowClient", name: str) -> None:
    known = sorted(experiment.name for experiment in search_pages(client.search_experiments))
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"no experiment {name!r} in this store; {hint}known are {', '.join(known)}")


def _finished_job(client: "MlflowClient", run: "Run") -> FinishedJob | None:
    run_id, tags = run.info.run_id, run.data.tags
    read = artifact_reader(client, run_id)
    content, evaluation = read("result.json"), read("evaluation_pruned.json")
    if content is None:
        return None
    measured = json.loads(evaluation)["perplexity"] if evaluation else {}
    result = json.loads(content)
    return FinishedJob(
        run_id=run_id,
        name=run.info.run_name,
        started_ms=run.info.start_time,
        result=_of_earlier_releases(run, read, measured, result) | result,
        window_losses={corpus: tuple(row["window_losses"]) for corpus, row in measured.items()},
        versions={"tsp": tags.get("tsp_version", "?")}
        | {tag.partition(".")[2]: value for tag, value in sorted(tags.items()) if tag.startswith("version.")},
        command=(read("command.txt") or b"").decode().strip(),
        link=links_of(client.tracking_uri, run.info.experiment_id, run_id)["run"],
        read=read,
    )


def _of_earlier_releases(
    run: "Run", read: Callable[[str], bytes | None], measured: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    """The keys without which jobs cannot be compared, from the run's other records where `result.json` lacks them."""
    if {"settings", "seed", "num_drop", "corpora"} <= set(result):
        return {}
    config = parse_yaml((read("config.yaml") or b"{}").decode(), f"config.yaml of run {run.info.run_id}")
    digests = {
        entry.dataset.name: entry.dataset.digest
        for entry in run.inputs.dataset_inputs
        if any(tag.value == "evaluation" for tag in entry.tags)
    }
    corpora = {
        corpus: {
            "fingerprint": digests.get(corpus),
            "num_windows": row["num_windows"],
            "block_tokens": row["block_tokens"],
        }
        for corpus, row in measured.items()
    }
    return {
        "settings": flatten(config),
        "seed": config.get("seed", 0),
        "num_drop": len(result["dropped"]),
        "corpora": corpora,
    }


def artifact_reader(client: "MlflowClient", run_id: str) -> Callable[[str], bytes | None]:
    """Reads artifacts of a run by their path; each folder is listed once."""

    @functools.cache
    def listed(folder: str) -> set[str]:
        return {info.path for info in client.list_artifacts(run_id, folder or None)}

    def read(path: str) -> bytes | None:
        if path not in listed(path.rpartition("/")[0]):
            return None
        with tempfile.TemporaryDirectory(prefix="tsp-") as folder:
            return Path(client.download_artifacts(run_id, path, folder)).read_bytes()

    return read

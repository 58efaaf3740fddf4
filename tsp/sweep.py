"""Many jobs in one launch: the model is loaded once, and what several jobs need is measured once.

Each job is a child run of one parent run. A sweep that is started again skips the jobs that are finished in its
experiment, tries those that failed last, and goes on after a failure.
"""

import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsp.choose import order_key
from tsp.compare.groups import compare
from tsp.compare.outputs import log_comparison
from tsp.config import JobConfig
from tsp.engine import Engine
from tsp.errors import ConfigError, TspError, is_everywhere
from tsp.files import require_new
from tsp.grid import in_words
from tsp.job import Job, Preparation
from tsp.machine import is_first_node, require_restorable
from tsp.pipeline import run_job
from tsp.shared import Shared
from tsp.tracked import tracked
from tsp.tracking.earlier import JOB_HASH, latest_run
from tsp.tracking.results import KIND_TAG, finished_jobs, runs_by_tag
from tsp.tracking.run import Tracker, start_run

log = logging.getLogger("tsp")

_SWEEP_HASH = "sweep_hash"


@dataclass(frozen=True)
class Child:
    """How one job of a sweep ended."""

    varied: dict[str, Any]
    status: str
    """`FINISHED`, `FAILED`, or `SKIPPED`: finished in an earlier launch."""
    run_id: str | None
    reason: str | None = None


def prepare_sweep(
    configs: Iterable[tuple[dict[str, Any], JobConfig]],
    ds_path: Path,
    output: Path | None,
    *,
    root: Path,
    world_size: int,
) -> list[Job]:
    """Check every job of a sweep before the first one starts.

    Args:
        configs: what is varied, its values, and the config of each job.
        ds_path: DeepSpeed JSON.
        output: folder that is to hold a folder per job; None: below `mlruns/`.
        root: working directory.
        world_size: ranks.

    Raises:
        TspError: with exit code 2 and the job that is wrong; nothing has been opened or written.
    """
    preparation = Preparation(ds_path, root=root, world_size=world_size)
    jobs: list[Job] = []
    folders: set[Path] = set()
    for varied, config in configs:
        folder = output / _folder_name(varied) if output else None
        try:
            if folder is not None:
                _check_folder(folder, folders)
            jobs.append(preparation.job(config, folder, varied))
        except TspError as error:
            raise type(error)(f"{error} (in the job {in_words(varied)})") from None
    if len({job.config.tracking.experiment for job in jobs}) > 1:
        raise ConfigError("tracking.experiment must be the same for all jobs of a sweep; it cannot be varied")
    # One model after the other.
    models = list(dict.fromkeys(job.config.model for job in jobs))
    jobs.sort(key=lambda job: models.index(job.config.model))
    for job, following in itertools.pairwise(jobs):
        if job.config.model == following.config.model and job.config.transfer != "none":
            require_restorable(job.sharding, "a sweep", "run one job at a time")
    return _with_traces(jobs)


def run_sweep(jobs: Sequence[Job], root: Path) -> tuple[list[Child], dict[str, str]]:
    """Run what is left of a sweep on this rank; the same call on every rank.

    Args:
        jobs: from `prepare_sweep`.
        root: working directory.

    Returns:
        How each job ended, in the order of `jobs`; and on rank 0 where to look at the parent run in MLflow's UI.
    """
    engine = Engine.start(jobs[0].config, jobs[0].sharding)
    # By name, as each node has copies of the model's files whose dates are their own, and with them another hash.
    names = engine.on_first(lambda: [job.hash for job in jobs])
    finished, failed = engine.on_first(lambda: _earlier(jobs, root))
    named = list(zip(names, jobs, strict=True))
    children = {name: Child(job.varied, "SKIPPED", finished[name]) for name, job in named if name in finished}
    left = sorted((one for one in named if one[0] not in finished), key=lambda one: one[0] in failed)
    with tracked(engine, lambda: _open_parent(jobs, root)) as (tracker, parent):
        shared = Shared()
        for number, (name, job) in enumerate(left, start=1):
            log.warning("job %d of %d: %s", number, len(left), in_words(job.varied)) if engine.is_first else None
            if number > 1 and job.config.model != left[number - 2][1].config.model:
                shared = Shared()
            shared.more_to_come = number < len(left) and left[number][1].config.model == job.config.model
            children[name], shared = _attempt(job, root, shared, parent)
        if isinstance(tracker, Tracker):
            _compare(tracker, root)
        ended = [children[name] for name in names]
        num_failed = sum(child.status == "FAILED" for child in ended)
        if num_failed:
            tracker.finish("FAILED", f"{num_failed} of {len(jobs)} jobs failed")
    engine.stop()
    return ended, tracker.links()


def _compare(tracker: Tracker, root: Path) -> None:
    """Log tables, figures and page of all that is finished in the experiment; a fault in them costs no job."""
    try:
        comparison = compare(finished_jobs(root, tracker.experiment))
        log_comparison(comparison, tracker, root / "mlruns" / "output" / tracker.run_id / "comparison")
    except TspError as error:
        log.warning("nothing to compare: %s", error)


def _attempt(job: Job, root: Path, shared: Shared, parent: str) -> tuple[Child, Shared]:
    """Run a job; after a failure the model in memory is not to be trusted, and nothing is shared with what follows."""
    engine = Engine.start(job.config, job.sharding)
    try:
        result, _ = run_job(job, engine, root, shared, parent)
    except Exception as error:
        # What is wrong with a job is wrong on every rank; anything else may have struck one rank alone, for which the
        # others would wait in vain.
        if engine.world_size > 1 and not is_everywhere(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        if engine.is_first:
            log.warning("job failed, going on: %s: %s", in_words(job.varied), reason)
        return Child(job.varied, "FAILED", None, reason), Shared()
    return Child(job.varied, "FINISHED", result["run_id"]), shared


def _with_traces(jobs: list[Job]) -> list[Job]:
    """Jobs with the same selection but for the number of layers know the largest number."""
    longest: dict[Any, int] = {}
    for job in jobs:
        key = (job.config.model, order_key(job))
        longest[key] = max(longest.get(key, 0), job.trace_to)
    return [replace(job, trace_to=longest[job.config.model, order_key(job)]) for job in jobs]


def _earlier(jobs: Sequence[Job], root: Path) -> tuple[dict[str, str], set[str]]:
    """Run ids of the finished jobs by hash, and the hashes of those that failed.

    Raises:
        ConfigError: the folder of a job that is left holds something else than an earlier attempt at it.
    """
    experiment = jobs[0].config.tracking.experiment
    finished = runs_by_tag(root, experiment, JOB_HASH, status="FINISHED")
    for job in jobs:
        if job.output and job.hash not in finished and not latest_run(root, experiment, job.hash, job.output):
            require_new(job.output)
    failed = set(runs_by_tag(root, experiment, JOB_HASH, status="FAILED")) - set(finished)
    return finished, failed


def _open_parent(jobs: Sequence[Job], root: Path) -> Tracker:
    """The parent run; that of an earlier launch of the same sweep goes on."""
    tracking = jobs[0].config.tracking
    sweep_hash = hashlib.sha256("".join(sorted(job.hash for job in jobs)).encode()).hexdigest()[:16]
    keys = dict.fromkeys(key for job in jobs for key in job.varied)
    axes = {key: sorted({str(job.varied[key]) for job in jobs if key in job.varied}) for key in keys}
    return start_run(
        root,
        experiment=tracking.experiment,
        run_name=tracking.run_name or f"sweep of {len(jobs)} jobs: {', '.join(axes)}",
        tags={KIND_TAG: "sweep", _SWEEP_HASH: sweep_hash},
        params={key: ", ".join(values) for key, values in axes.items()},
        resume=runs_by_tag(root, tracking.experiment, _SWEEP_HASH).get(sweep_hash),
    )


def _check_folder(folder: Path, others: set[Path]) -> None:
    """No other job has it, and it is new, empty, or of a job: of which one is looked at when the store is open."""
    if folder in others:
        raise ConfigError(f"--output has no folder for it alone, another job would have {folder}, too; leave it out")
    others.add(folder)
    if is_first_node() and not (folder / "job.log").is_file():
        require_new(folder)


def _folder_name(varied: dict[str, Any]) -> str:
    return re.sub(r"[^\w.=-]+", "-", "_".join(f"{key}={value}" for key, value in varied.items())) or "job"

"""A run in MLflow: opened with all that it is made of, and however it ends, it says so."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml

from tsp import __version__
from tsp.config import flatten
from tsp.engine import Engine
from tsp.heartbeat import joined
from tsp.job import Job
from tsp.masking import masked_tree
from tsp.tracking.earlier import JOB_HASH
from tsp.tracking.null import NullTracker
from tsp.tracking.results import KIND_TAG
from tsp.tracking.run import Tracker, start_run

_VERSIONED = ("torch", "deepspeed", "transformers", "mlflow")


@contextmanager
def tracked(engine: Engine, start: Callable[[], Tracker]) -> Iterator[tuple[Tracker | NullTracker, str]]:
    """A run for the length of a block; however that ends, the run says so, unless it was finished inside.

    Args:
        engine: tells every rank the run's id, or why there is none.
        start: opens the run; called on rank 0.

    Yields:
        The tracker, off rank 0 one that does nothing, and the run's id.
    """
    tracker: Tracker | NullTracker = NullTracker()

    def open_own() -> str:
        nonlocal tracker
        tracker = start()
        return tracker.run_id

    run_id = engine.on_first(open_own)
    try:
        with joined().telling(lambda reason: tracker.finish("FAILED", reason=reason)):
            yield tracker, run_id
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        tracker.finish("KILLED" if killed else "FAILED", reason=f"{type(error).__name__}: {error}"[:500])
        raise
    tracker.finish("FINISHED")


def open_run(
    job: Job,
    engine: Engine,
    root: Path,
    parent: str | None = None,
    kind: Literal["job", "trial"] = "job",
    resume: str | None = None,
) -> Tracker:
    """Start the run, below its sweep's if it has a parent, and log everything that is known before the first step."""
    config, source = job.config, job.source
    resolved = masked_tree(config.model_dump(mode="json"))
    resolved_yaml = yaml.safe_dump(resolved, sort_keys=False)
    versions = {package: importlib.metadata.version(package) for package in _VERSIONED}
    asked = (job.plan.bound or f"{job.plan.num_drop}of{job.plan.num_layers}").removeprefix("prune.").replace(" ", "-")
    name = f"{config.prune.method}-{Path(source.name).name}-{asked}"
    varied = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in job.varied.items())
    tracker = start_run(
        root,
        experiment=config.tracking.experiment,
        run_name=varied or config.tracking.run_name or name,
        parent=parent,
        resume=resume,
        replays=resume is not None,
        tags={
            "method": config.prune.method,
            "transfer": config.transfer,
            "base_model": source.name,
            "base_revision": source.revision or "",
            "world_size": str(engine.world_size),
            "zero_stage": str(engine.zero_stage),
            KIND_TAG: kind,
            **({} if job.plan.num_drop is None else {"num_drop": str(job.num_drop)}),
            # A trial is not evaluated: a sweep is not to take it for the finished job.
            **({JOB_HASH: job.hash} if kind == "job" else {}),
            "config_hash": hashlib.sha256(resolved_yaml.encode()).hexdigest()[:16],
            "tsp_version": __version__,
            **{f"version.{package}": version for package, version in versions.items()},
        },
        params=flatten(resolved),
    )
    tracker.text(resolved_yaml, "config.yaml")
    tracker.text(json.dumps(job.sharding, indent=2), "deepspeed.json")
    tracker.text(job.command + "\n", "command.txt")
    tracker.dataset(job.calibration.name, job.calibration.fingerprint, job.calibration.source, "calibration")
    for corpus in job.evals:
        tracker.dataset(corpus.name, corpus.fingerprint, corpus.source, "evaluation")
    return tracker

"""`--resume RUN_ID|latest`: the run that a job goes on with, and a folder that it can go on in.

earlier = resumed(job, root, "latest")
...                                     # Open the run: nobody else writes it then.
clear(earlier.output)
"""

import logging
import shutil
from pathlib import Path

from tsp.errors import ConfigError
from tsp.files import require_new
from tsp.job import Job
from tsp.tracking.earlier import EarlierRun, latest_run, named_run

log = logging.getLogger("tsp")

LATEST = "latest"


def resumed(job: Job, root: Path, resume: str) -> EarlierRun | None:
    """Find the run; rank 0 only. Nothing is written.

    Args:
        job: from `job.prepare`.
        root: working directory.
        resume: run id, or `latest`: the newest unfinished one whose folder is `--output`, else of the experiment.

    Returns:
        The run; None: there is nothing to go on with, and the job starts from the beginning.

    Raises:
        ConfigError: the run is not there, finished or of another job, or `--output` is neither its folder nor an
            empty one.
        TrackingError: the store does not answer.
    """
    if resume == LATEST:
        earlier = latest_run(root, job.config.tracking.experiment, job.hash, job.output)
    else:
        earlier = named_run(root, resume, job.hash)
        if job.output is not None and job.output.absolute() != earlier.output:
            raise ConfigError(f"--output {job.output} is not the folder of run {resume}, which is {earlier.output}")
    if earlier is None:
        if job.output is not None:
            require_new(job.output)
        log.warning("--resume latest: no unfinished run of this job; it starts from the beginning")
        return None
    log.warning("run %s goes on", earlier.run_id)
    return earlier


def clear(output: Path) -> None:
    """Remove what is made anew. Only while the run is held: it may be that of a job that is alive."""
    for made in ("model", "model-int8", "dense-int8", "result.json"):
        path = output / made
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

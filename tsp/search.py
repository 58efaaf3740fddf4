"""A search that is checked and ready to run: what can be found wrong is found before anything is opened or written."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsp.config import JobConfig, bound_of
from tsp.errors import ConfigError
from tsp.files import require_writable
from tsp.job import Job, Preparation
from tsp.machine import is_first_node, require_restorable
from tsp.settings import TUNING_BLOCKS
from tsp.space import Knob
from tsp.tuned import is_of

_MARKS = (0.5, 0.75)
"""Shares of the steps after which a trial may be stopped; earlier, large learning rates look worse than in the end."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A checked search, ready to run."""

    job: Job
    """The preset: what every trial differs from."""
    knobs: tuple[Knob, ...]
    seconds: float
    """Of this launch."""
    max_trials: int | None
    """In all, those of earlier launches among them."""
    best: Path
    """YAML file of the best settings."""
    differing: Callable[[JobConfig], dict[str, Any]]
    """What such a file has to state of a job."""
    preparation: Preparation
    started: float
    """By `time.monotonic`."""

    @property
    def hash(self) -> str:
        """16 hex digits that two searches share if they do the same with the same model and texts."""
        space = [asdict(knob) for knob in self.knobs]
        return hashlib.sha256(json.dumps([self.job.hash, space]).encode()).hexdigest()[:16]


def marks(num_steps: int) -> set[int]:
    """After how many steps a trial of so many may be stopped."""
    return {math.ceil(share * num_steps) for share in _MARKS} - {num_steps}


def prepare_search(
    config: JobConfig,
    knobs: tuple[Knob, ...],
    ds_path: Path,
    *,
    minutes: float,
    max_trials: int | None,
    best: Path,
    differing: Callable[[JobConfig], dict[str, Any]],
    root: Path,
    world_size: int,
) -> Search:
    """Check all that can be found wrong before anything is opened or written.

    Args:
        config: the preset.
        knobs: from `space.read_space`.
        ds_path: DeepSpeed JSON.
        minutes: that this launch may take.
        max_trials: in all; None: as many as fit.
        best: YAML file to write; one that is there has to be of the same search.
        differing: what such a file has to state of a job.
        root: working directory.
        world_size: ranks.

    Raises:
        TspError: with exit code 2; nothing has been opened or written.
    """
    started = time.monotonic()
    if bound := bound_of(config.prune):
        raise ConfigError(
            f"tsp tune searches settings for one number of layers; give it (--num-drop) instead of {bound}"
        )
    if not config.data.tuning_blocks:
        data = config.data.model_copy(update={"tuning_blocks": TUNING_BLOCKS})
        config = config.model_copy(update={"data": data})
    preparation = Preparation(ds_path, root=root, world_size=world_size)
    job = preparation.job(config, None)
    require_restorable(job.sharding, "tsp tune", "tune another sharding of the same model")
    search = Search(
        job=job,
        knobs=knobs,
        seconds=60 * minutes,
        max_trials=max_trials,
        best=best,
        differing=differing,
        preparation=preparation,
        started=started,
    )
    if is_first_node():
        require_writable(best.parent, f"--best {best}")
    if best.exists() and not is_of(best, search.hash):
        raise ConfigError(f"--best {best} is there and not of this search; move it away, or name another file")
    return search

"""Jobs for benchmarks, from the words of a command line."""

from pathlib import Path

from tsp.cli import launched_prune
from tsp.job import Job, prepare
from tsp.options import configs_from_options, sharding_path


def job_of(*words: str, world_size: int = 1) -> Job:
    """The job of `tsp prune WORDS`, ready to run in this process; the demo model, ZeRO-3, unless they say otherwise."""
    options = launched_prune.make_context("prune", list(words)).params
    ((_, config),) = configs_from_options(options)
    return prepare(config, sharding_path(options), None, root=Path.cwd(), world_size=world_size)


def settings(**given: object) -> list[str]:
    """`--set` words; keys with `__` for the dot."""
    return [word for key, value in given.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]

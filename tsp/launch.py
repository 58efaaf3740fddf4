"""How a command starts `deepspeed` with one of our launchers, handing its own options on; and which rank this is."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tsp.options import is_given
from tsp.paths import shipped

_PASSED_ON = {"nproc": "num_accelerators", "hostfile": "hostfile", "include": "include", "master_port": "master_port"}
# Without the file deepspeed would use this node alone, and say so below the level that we let it speak at.
_EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


def launcher_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that are deepspeed's own to a click command."""
    for option in (
        click.option("--master-port", type=int, help="Passed on to deepspeed."),
        click.option("--include", help="Passed on to deepspeed."),
        click.option("--hostfile", type=_EXISTING, help="Nodes and slots; passed on to deepspeed."),
        click.option("--nproc", type=click.IntRange(min=1), help="Ranks on this node [one per GPU; 1 without]."),
    ):
        command = option(command)
    return command


def launch_command(context: click.Context, launched: click.Command, script: str) -> list[str]:
    """The words that start `deepspeed launchers/SCRIPT` with the same options.

    Args:
        context: of the command that was called.
        launched: the command that the script runs; it takes those of the options that are not deepspeed's.
        script: file name of the launcher.
    """
    # Below this level deepspeed says the whole command line, up to three times, with all that stands in it.
    command = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "critical"]
    for name, flag in _PASSED_ON.items():
        if context.params[name] is not None:
            command += [f"--{flag}", str(context.params[name])]
    return [*command, str(shipped(f"launchers/{script}")), *_again(context, launched)]


def world_size() -> int:
    """Ranks, as the launcher has it; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def _again(context: click.Context, launched: click.Command) -> list[str]:
    """The options of this call, as the launcher takes them."""
    names = {parameter.name for parameter in launched.params}
    words: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name not in names or not is_given(value):
            continue
        flag = parameter.opts[0]
        values = value if isinstance(value, tuple) else (value,)
        words += [flag] if value is True else [word for item in values for word in (flag, _as_word(item))]
    return words


def _as_word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)

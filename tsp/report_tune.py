"""A search on the terminal: its best trials, and what to do with them."""

import math
import shlex
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from tsp.console import console

_SHOWN = 10


def print_search(document: dict[str, Any], run_link: str, stdout: TextIO) -> None:
    """The best trials, what the losses are to be held against, and the next command."""
    out = console(stdout)
    trials = document["trials"]
    complete = sorted((trial for trial in trials if trial["loss"] is not None), key=lambda trial: trial["loss"])
    counted = [f"{len(complete)} complete"]
    counted += [
        f"{number} {state}"
        for state in ("pruned", "failed")
        if (number := sum(trial["state"] == state for trial in trials))
    ]
    table = Table(title=f"{len(trials)} trials ({', '.join(counted)}), the best first")
    keys = list(document["space"])
    for heading in ("trial", *(key.rpartition(".")[2] for key in keys), "loss", "perplexity", "seconds"):
        table.add_column(heading, justify="right")
    for trial in complete[:_SHOWN]:
        settings = document["preset"] if trial["preset"] else trial["settings"]
        name = f"preset {trial['number']}" if trial["preset"] else str(trial["number"])
        found = (f"{trial['loss']:.4f}", f"{math.exp(trial['loss']):.2f}", f"{trial['seconds']:.0f}")
        table.add_row(name, *(_cell(settings.get(key)) for key in keys), *found)
    out.print(table)
    named = {"dense": "dense", "bare_drop": "without the layers", "preset": "preset", "best": "best"}
    losses = document["loss"]
    shown = [f"{word} {losses[key]:.4f}" for key, word in named.items() if losses.get(key) is not None]
    out.print(f"loss on {document['tuning_blocks']} blocks of tuning text: {', '.join(shown)}", soft_wrap=True)
    for trial in trials:
        if trial["state"] in ("failed", "pruned"):
            out.print(f"trial {trial['number']} {trial['state']}: {trial['reason']}", soft_wrap=True)
    path = Path(document["config"])
    shown_path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    out.print(f"prune       tsp prune --config {shlex.quote(str(shown_path))}", soft_wrap=True)
    out.print("go on       the same command again", soft_wrap=True)
    out.print(f"look        tsp ui   # then {run_link}", soft_wrap=True)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

"""What a search leaves: the YAML file of the best settings, and its own document in MLflow and for `--json`."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tsp.config import flatten
from tsp.masking import masked, masked_tree
from tsp.records import write_json
from tsp.space import with_settings
from tsp.study import Trial
from tsp.tracking.run import Tracker

if TYPE_CHECKING:
    from tsp.search import Search

DOCUMENT_SCHEMA = 1
_HEAD = "# Found by `tsp tune`, search {}"


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The complete trial with the least loss, of equal ones the first; None: there is none."""
    complete = [trial for trial in trials if trial.loss is not None]
    return min(complete, key=lambda trial: trial.loss or 0.0, default=None)


def preset_of(trials: Sequence[Trial]) -> Trial | None:
    """The job's own settings as a complete trial."""
    return next((trial for trial in trials if trial.preset and trial.loss is not None), None)


def is_of(path: Path, search_hash: str) -> bool:
    """Whether a file was written by a search with this hash."""
    try:
        return path.read_text(encoding="utf-8").startswith(_HEAD.format(search_hash))
    except (OSError, UnicodeDecodeError):
        return False


def num_tuning_blocks(search: "Search") -> int:
    """Sequences that the loss is measured on; may be fewer than asked for."""
    return len(search.job.tuning.blocks) if search.job.tuning else 0


def write_tuned(search: "Search", best: Trial, trials: Sequence[Trial]) -> None:
    """Write the best settings as `tsp prune --config` takes them; the file appears whole or not at all."""
    preset, num_blocks = preset_of(trials), num_tuning_blocks(search)
    lines = [
        f"{_HEAD.format(search.hash)}; use it: tsp prune --config {shlex.quote(str(search.best))}",
        f"# {_command()}",
        f"# trial {best.number} of {len(trials)}: loss {best.loss:.4f} on {num_blocks} blocks of tuning text, "
        f"the preset {f'{preset.loss:.4f}' if preset else 'none'}",
    ]
    content = search.differing(with_settings(search.job.config, best.settings))
    temporary = search.best.with_name(search.best.name + ".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(
        "\n".join(lines) + "\n" + yaml.safe_dump(masked_tree(content), sort_keys=False), encoding="utf-8"
    )
    os.replace(temporary, search.best)


def publish(
    search: "Search",
    tracker: Tracker,
    root: Path,
    untrained: dict[str, float],
    trials: Sequence[Trial],
    best: Trial,
    seconds: float,
) -> dict[str, Any]:
    """Log the file, the trials and the losses to the parent run; rank 0 only.

    Returns:
        What `--json` prints.
    """
    preset, own = preset_of(trials), flatten(search.job.config.model_dump(mode="json"))
    losses = untrained | {"preset": preset.loss if preset else None, "best": best.loss}
    document = {
        "schema": DOCUMENT_SCHEMA,
        "search": search.hash,
        "run_id": tracker.run_id,
        "experiment": tracker.experiment,
        "model": search.job.source.name,
        "tuning_blocks": num_tuning_blocks(search),
        "space": {knob.key: knob.in_words() for knob in search.knobs},
        "preset": {knob.key: own.get(knob.key) for knob in search.knobs if knob.applies(own)},
        "loss": losses,
        "best": best.number,
        "settings": best.settings,
        "config": str(search.best.absolute()),
        "seconds": round(seconds, 1),
        "trials": [asdict(trial) for trial in trials],
    }
    folder = root / "mlruns" / "output" / tracker.run_id
    write_json(document, folder / "search.json")
    tracker.artifact(folder / "search.json")
    tracker.artifact(search.best)
    tracker.metrics({f"tune/loss_{name}": loss for name, loss in losses.items() if loss is not None}, step=0)
    tracker.metrics({"tune/loss": float(best.loss or 0.0), "tune/num_trials": len(trials)}, step=0)
    return document


def _command() -> str:
    """What the user called, as far as the rank was told."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if "--document" in words:
        place = words.index("--document")
        del words[place : place + 2]
    return masked(shlex.join(["tsp", "tune", *words]))

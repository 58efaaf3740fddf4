"""Finished jobs made by hand, with results that are known beforehand."""

import math
import random
from typing import Any

from tsp.tracking.results import FinishedJob

WINDOWS = 40
LAYERS = 8
DENSE = 10.0
BASE = [math.log(DENSE) + 0.4 * random.Random(0).gauss(0, 1) for _ in range(WINDOWS)]
BASE = [loss - math.fsum(BASE) / WINDOWS + math.log(DENSE) for loss in BASE]
"""Losses of the dense model; their mean is exactly log(DENSE)."""


def finished(
    method: str = "sleb",
    transfer: str = "finetune",
    *,
    ppl: float = 12.0,
    seed: int = 0,
    dropped: tuple[int, ...] = (2, 5),
    noise: float = 0.02,
    started_ms: int = 0,
    settings: dict[str, Any] | None = None,
    corpora: tuple[str, ...] = ("wiki",),
    fingerprint: str = "e" * 16,
    calibration: dict[str, Any] | None = None,
    keep_losses: bool = True,
    trajectories: bytes | None = None,
    **changes: Any,
) -> FinishedJob:
    """A job whose pruned perplexity is exactly `ppl` on each corpus; `changes` replace keys of the result.

    The losses of the windows are those of the dense model, shifted, with noise of standard deviation `noise`.
    """
    draw = random.Random(f"{method} {transfer} {seed} {dropped} {settings}")
    differences = [draw.gauss(0, noise) for _ in range(WINDOWS)]
    shift = math.log(ppl / DENSE) - math.fsum(differences) / WINDOWS
    losses = tuple(loss + shift + difference for loss, difference in zip(BASE, differences, strict=True))
    result = {
        "schema": 1,
        "experiment": "by-hand",
        "status": "FINISHED",
        "method": method,
        "transfer": transfer,
        "model": "tiny/model",
        "num_layers": LAYERS,
        "num_drop": len(dropped),
        "dropped": list(dropped),
        "seed": seed,
        "settings": {"prune.method": method, "transfer": transfer, "seed": seed} | (settings or {}),
        "calibration": {"name": "text", "fingerprint": "c" * 16, "num_blocks": 16, "block_tokens": 32}
        | (calibration or {}),
        "corpora": {name: {"fingerprint": fingerprint, "num_windows": WINDOWS, "block_tokens": 32} for name in corpora},
        "perplexity": {name: {"dense": DENSE, "bare_drop": 2 * DENSE, "pruned": ppl} for name in corpora},
        "parameters": {"dense": 1000, "pruned": 1000 - 100 * len(dropped)},
        "speed": {"prompt_tokens_per_s": {"dense": 100.0, "bare_drop": 120.0, "pruned": 125.0}},
        "seconds": {"load": 1.0, "select": 30.0, "transfer": 60.0, "evaluate": 5.0, "save": 1.0, "total": 97.0},
        "peak_memory_gib": [2.0, 1.5],
        "weights_gib": [0.5, 0.5],
        "trained_tokens": 4096,
        "tuning_loss": None,
    }
    return FinishedJob(
        run_id=f"{method}-{transfer}-{seed}-{started_ms}",
        name=method,
        started_ms=started_ms,
        result=result | changes,
        window_losses=dict.fromkeys(corpora, losses) if keep_losses else {},
        versions={"tsp": "0.1"},
        command="tsp prune",
        link="http://127.0.0.1:5000/#/experiments/1/runs/1",
        read=lambda path: trajectories,
    )

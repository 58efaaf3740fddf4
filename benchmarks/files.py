"""How fast checkpoints are read and written, against a plain copy of the same files: load, drop, save.

    python benchmarks/files.py [--json]

A synthetic checkpoint of 2 GiB in bf16. `load` reads it into ZeRO-3 shards, `save` writes it out of them without three
layers, `drop` does so from file to file. The copy is `shutil.copyfile` and `fsync` of each weight file; all take turns
for six rounds, medians of the GiB/s read or written. The files are in the system's cache, as none of this is about
the disk.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _jobs import job_of, settings
from _rows import row, show
from drop_memory import write_checkpoint

from tsp.checkpoint import load, save_without
from tsp.config import ModelConfig
from tsp.drop import drop_layers
from tsp.engine import Engine
from tsp.files import GIB
from tsp.source import open_source

DROPPED = (3, 7, 9)
ROUNDS = 6
SHARE = 0.5
"""Of the copy's GiB/s."""


def weights_gib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GIB


def copy_files(folder: Path, target: Path) -> None:
    target.mkdir()
    for path in folder.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def measure(place: Path) -> dict[str, float]:
    """GiB/s, by what is done."""
    dense = place / "dense"
    dense.mkdir()
    write_checkpoint(dense)
    job = job_of(*settings(model__dtype="bf16"))
    engine = Engine.start(job.config, job.sharding)
    source = open_source(ModelConfig(path=str(dense)))
    found = defaultdict(list)
    target = place / "target"

    def timed(name: str, act: Callable[[], object], folder: Path) -> object:
        os.sync()  # Else a disk that still discards what was removed before is waited for here.
        started = time.perf_counter()
        result = act()
        found[name].append(weights_gib(folder) / (time.perf_counter() - started))
        print(f"{name}: {found[name][-1]:.2f} GiB/s", file=sys.stderr)
        shutil.rmtree(target, ignore_errors=True)
        return result

    for turn in range(ROUNDS):
        decoder = timed("load", lambda: load(source, engine.dtype, engine.loading()), dense)
        writers = [
            ("copy", partial(copy_files, dense, target), dense),
            ("drop", partial(drop_layers, source, DROPPED, target), target),
            (
                "save",
                partial(save_without, decoder, source, DROPPED, target, gathered=engine.gathered, write=True),
                target,
            ),
        ]
        # Each is the first as often as the others: some disks take the first GiB faster than the next.
        for name, act, folder in writers[turn % 3 :] + writers[: turn % 3]:
            timed(name, act, folder)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place))
    show(
        [row(f"{name}_share_of_copy", found[name] / found["copy"], ">=", SHARE) for name in ("load", "drop", "save")],
        as_json=args.json,
    )


if __name__ == "__main__":
    main()

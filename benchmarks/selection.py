"""How long the choice of a quarter of the demo's layers takes, and what it is worth: `tsp`, SLEB, ShortGPT.

    python benchmarks/selection.py [--rounds 2] [--json]

One process, one loaded model under ZeRO-3, the same calibration blocks; the methods take turns, medians. `plain SLEB`
computes each candidate from the first layer on, `SLEB` keeps what the layers before it gave (`prune.reuse_prefix`).
The bare drop is the model without the chosen layers on held-out text.
"""

import argparse
import math
import statistics
import sys
import time
from collections import defaultdict

from _jobs import job_of
from _rows import row, show
from rich.console import Console
from rich.table import Table

from tsp.choose import choose
from tsp.engine import Engine
from tsp.pipeline import make_bench
from tsp.shared import Shared, Stopwatch
from tsp.tracking.null import NullTracker

METHODS = {
    "tsp": "tsp",
    "plain SLEB": "sleb --set prune.reuse_prefix=false",
    "SLEB": "sleb",
    "ShortGPT": "shortgpt",
}


def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and bare-drop perplexity of each round, by method."""
    jobs = {name: job_of("--method", *words.split()) for name, words in METHODS.items()}
    loaded, found = Shared(), defaultdict(list)
    for _ in range(rounds):
        for name, job in jobs.items():
            engine = Engine.start(job.config, job.sharding)
            bench = make_bench(job, engine, NullTracker(), shared=loaded, watch=Stopwatch())
            with engine.mounted(bench.decoder.model) as bench.model:
                started = time.perf_counter()
                _, chosen = choose(bench, job, Shared(), Stopwatch())
                seconds = time.perf_counter() - started
                loss = bench.loss_without(chosen.doomed, job.evals[0].blocks)
            found[name].append((seconds, math.exp(loss)))
            print(f"{name}: {seconds:.1f} s, layers {chosen.doomed}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    found = {
        name: tuple(map(statistics.median, zip(*rows, strict=True))) for name, rows in measure(args.rounds).items()
    }
    seconds, ppl = ({name: pair[at] for name, pair in found.items()} for at in (0, 1))
    if not args.json:
        table = Table("selection", "seconds", "bare-drop perplexity")
        for name in METHODS:
            table.add_row(name, f"{seconds[name]:.1f}", f"{ppl[name]:.3f}")
        Console().print(table)
    show(
        [
            row("selection_times_as_fast_as_plain_sleb", seconds["plain SLEB"] / seconds["tsp"], ">=", 4.0),
            row("selection_bare_drop_ppl_over_plain_sleb", ppl["tsp"] / ppl["plain SLEB"], "<=", 1.0),
        ],
        as_json=args.json,
    )


if __name__ == "__main__":
    main()

"""How the time of a stage-1 step grows with tokens, layers, hidden size: exponents of fitted powers.

    python benchmarks/growth.py [--rounds 5] [--json]

Llamas with random weights, 4 to 32 layers, under ZeRO-3 on one rank; the sizes take turns, medians. An exponent of 1 is
linear. Tokens grow by sequences of one length, as attention is quadratic in that; hidden size is shown and not judged
(2 is the exponent of the matrix products alone).
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _jobs import job_of, settings
from _rows import row, show
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tsp.engine import Engine
from tsp.methods.trsp import stage1
from tsp.pipeline import make_bench
from tsp.shared import Shared, Stopwatch
from tsp.tracking.null import NullTracker

DEMO = Path(__file__).parent.parent / "tsp" / "demo" / "model"
BASE = {"tokens": 2048, "layers": 8, "hidden": 256}
GROWN = {"tokens": (1024, 2048, 4096, 8192), "layers": (4, 8, 16, 32), "hidden": (128, 256, 512)}
TARGETS = {"tokens": 1.05, "layers": 1.05}
BLOCK_TOKENS = 256


def model_folder(place: Path, layers: int, hidden: int) -> Path:
    """A Llama with the demo's tokenizer."""
    folder = place / f"{layers}x{hidden}"
    if not folder.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, max_position_embeddings=512, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def seconds_of(folder: Path, num_tokens: int, rounds: int) -> list[float]:
    """Of each step after the first, which warms up."""
    job = job_of(
        *("--model", str(folder), "--data", "stdlib"),
        *settings(
            train__batch_size=num_tokens // BLOCK_TOKENS,
            data__block_tokens=BLOCK_TOKENS,
            data__max_blocks=64,
            eval__block_tokens=BLOCK_TOKENS,
            eval__max_blocks=4,
            stage1__schedule="budget",
            stage1__steps=rounds + 1,
        ),
    )
    engine = Engine.start(job.config, job.sharding)
    bench = make_bench(job, engine, NullTracker(), shared=Shared(), watch=Stopwatch())
    seconds: list[float] = []
    bench.after_step = lambda stage, stats, gates: seconds.append(stats.seconds)
    with engine.mounted(bench.decoder.model) as bench.model:
        stage1.score(bench, 1)
    return seconds[1:]


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of the line through the logarithms (least squares)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        for _ in range(2):
            for what, sizes in GROWN.items():
                for size in sizes:
                    given = BASE | {what: size}
                    folder = model_folder(Path(place), given["layers"], given["hidden"])
                    found[what, size] += seconds_of(folder, given["tokens"], args.rounds)
                    print(f"{what} {size}: {1e3 * statistics.median(found[what, size]):.0f} ms", file=sys.stderr)
    exponents = {
        what: exponent(sizes, [statistics.median(found[what, size]) for size in sizes]) for what, sizes in GROWN.items()
    }
    print(f"hidden size: exponent {exponents['hidden']:.2f}", file=sys.stderr)
    show([row(f"exponent_{what}", exponents[what], "<=", most) for what, most in TARGETS.items()], as_json=args.json)


if __name__ == "__main__":
    main()

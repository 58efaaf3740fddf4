"""How much of a GPU the stages use: Llamas with random weights, stage 1 and stage 2 as in a job, and the pruned one.

    python benchmarks/gpu.py [--shapes 1b,7b] [--positions 2048] [--steps 6] [--json]

Without a GPU the same runs on the CPU with a tiny shape, which says that it runs and nothing more; targets are judged
on a GPU with the shape `7b`. One rank under ZeRO-3, 8 sequences a step. MFU counts the operations that the mathematics
needs, of weights 2 P forward and 2 P backward, where P is what a token is multiplied with (no embeddings, but the
head), and of attention what lies below the diagonal; utilisation counts those also that activation checkpointing does
again. Both over the speed of a large matrix product, measured first on the same card.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _models import SHAPES, llama_config
from _rows import row, show
from hardware import build, measure, table_of
from rich.console import Console
from rich.table import Table

from tsp.calibrate import random_bench
from tsp.config import JobConfig, ModelConfig, load_config
from tsp.evaluation.speed import wait
from tsp.footprint import Shape, shape_of
from tsp.methods.trsp import stage1, stage2
from tsp.sharding import read_json

ZERO3 = Path(__file__).parent.parent / "ds_configs/zero3.json"
WARM_UP = 2
SEQUENCES = 8
"""Of a step."""


@dataclass(frozen=True)
class Case:
    """One way to run a stage."""

    stage: int
    accumulation: int
    checkpointing: bool = False


CASES = {
    "stage1": Case(stage=1, accumulation=2),
    "stage1_24gb": Case(stage=1, accumulation=2, checkpointing=True),
    "stage2_lora": Case(stage=2, accumulation=2),
}


@dataclass(frozen=True)
class Operations:
    """Of one step, in FLOPs."""

    model: float
    """What the mathematics needs."""
    hardware: float
    """With what is computed again."""


def operations_of(shape: Shape, case: Case, *, tokens_a_row: int, num_doomed: int) -> Operations:
    """By formula.

    Args:
        shape: of the dense model.
        case: what is run.
        tokens_a_row: of each of the `SEQUENCES`.
        num_doomed: layers that stage 2 leaves out.
    """
    heads, width = shape.config.num_attention_heads, shape.config.hidden_size // shape.config.num_attention_heads
    # Scores and their products with the values, half of each below the diagonal.
    attention = 2 * 2 * tokens_a_row * heads * width / 2
    layer, head = sum(shape.layer_parameters) / shape.num_layers, shape.vocab_size * shape.hidden_size

    def forward(num_layers: int) -> float:
        return num_layers * (2 * layer + attention) + 2 * head

    def both(num_layers: int) -> float:
        # Backward through a product with weights is one more; through one of activations it is two.
        return 2 * forward(num_layers) + num_layers * attention

    kept = shape.num_layers - (num_doomed if case.stage == 2 else 0)
    model = both(kept) + (forward(shape.num_layers) if case.stage == 2 else 0)
    again = kept * (2 * layer + attention) if case.checkpointing else 0
    tokens = SEQUENCES * tokens_a_row
    return Operations(tokens * model, tokens * (model + again))


def job_for(case: Case, folder: Path, *, tokens_a_row: int, num_doomed: int, steps: int) -> JobConfig:
    train = {"batch_size": SEQUENCES, "accumulation": case.accumulation, "activation_checkpointing": case.checkpointing}
    return load_config(
        [
            {
                "model": {"path": str(folder)},
                "data": {"block_tokens": tokens_a_row},
                "prune": {"num_drop": num_doomed},
                "train": train,
                "stage1": {"schedule": "budget", "steps": steps},
                "stage2": {"steps": steps, "lr": 1e-4},
            }
        ]
    )


def measured(case: Case, shape: Shape, config: JobConfig) -> tuple[float, float]:
    """Median seconds of a step, and the most GiB that the process held."""
    bench = random_bench(shape, config, read_json(ZERO3))
    seconds: list[float] = []
    bench.after_step = lambda stage, stats, gates: seconds.append(stats.seconds)
    if case.stage == 1:
        with bench.engine.mounted(bench.decoder.model) as bench.model:
            stage1.score(bench, config.prune.num_drop)
    else:
        stage2.transfer(bench, doomed(shape.num_layers, config.prune.num_drop), save_dtype=torch.bfloat16)
    [peak] = bench.engine.peak_memory_gib()
    return statistics.median(seconds[WARM_UP:]), peak


def doomed(num_layers: int, num_drop: int) -> list[int]:
    """The last but one and those before it: which they are makes no difference to speed."""
    return list(range(num_layers - 1 - num_drop, num_layers - 1))


def matmul_tflops(device: torch.device) -> float:
    """The best of a few rounds of products of large matrices."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        for _ in range(8):
            left @ right
        wait(device)
        best = min(best, (time.perf_counter() - started) / 8)
    return 2 * size**3 / best / 1e12


def pruned_speed(name: str, tokens_a_row: int, device: torch.device, rounds: int) -> dict[str, float]:
    """How many times as fast as dense at a quarter of the layers, and the limit."""
    new = min(32, tokens_a_row)
    model = build(name, tokens_a_row + new, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokens_BT = torch.randint(model.config.vocab_size, (SEQUENCES, tokens_a_row), device=device)
    rows = table_of(SEQUENCES, tokens_a_row, measure(model, tokens_BT, new, rounds))
    return min(rows, key=lambda one: abs(one["ratio"] - 0.25))


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a 7B on a GPU."""
    return [
        row("gpu_7b_stage1_mfu", found["stage1"]["mfu"], ">=", 0.5),
        row("gpu_7b_stage1_24gb_utilisation", found["stage1_24gb"]["utilisation"], ">=", 0.45),
        row("gpu_7b_stage1_24gb_peak_gib", found["stage1_24gb"]["peak_gib"], "<=", 24e9 / 2**30),
        row("gpu_7b_stage2_lora_mfu", found["stage2_lora"]["mfu"], ">=", 0.4),
    ]


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="1b,7b" if on_gpu else "tiny", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--positions", type=int, default=2048 if on_gpu else 64, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=6, help=f"after {WARM_UP} to warm up")
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    peak_tflops = matmul_tflops(device)
    card = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} CPU threads"
    table = Table(title=f"{card}, torch {torch.__version__}: {peak_tflops:.3g} TFLOP/s in a large product")
    for heading in ("shape", "", "tokens/s", "MFU", "utilisation", "peak GiB", "times dense", "limit"):
        table.add_column(heading)
    rows = []
    for name in args.shapes.split(","):
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            llama_config(name, args.positions).save_pretrained(folder)
            shape = shape_of(ModelConfig(path=folder))
            sizes = {"tokens_a_row": args.positions, "num_doomed": round(shape.num_layers / 4)}
            for label, case in CASES.items():
                config = job_for(case, Path(folder), steps=args.steps + WARM_UP, **sizes)
                seconds, peak = measured(case, shape, config)
                gc.collect()
                torch.cuda.empty_cache()
                needed = operations_of(shape, case, **sizes)
                found[label] = {
                    "mfu": needed.model / seconds / peak_tflops / 1e12,
                    "utilisation": needed.hardware / seconds / peak_tflops / 1e12,
                    "peak_gib": peak,
                }
                speed = SEQUENCES * args.positions / seconds
                cells = f"{found[label]['mfu']:.3f}", f"{found[label]['utilisation']:.3f}", f"{peak:.2f}"
                table.add_row(name, label, f"{speed:,.0f}", *cells, "", "")
        quarter = pruned_speed(name, args.positions, device, rounds=3)
        for kind in ("prompt", "generation"):
            cells = f"{quarter[f'{kind}_speedup']:.2f}", f"{quarter[f'{kind}_limit']:.2f}"
            table.add_row(name, f"pruned, {kind}", f"{quarter[f'{kind}_tokens_per_s']:,.0f}", "", "", "", *cells)
        if on_gpu and name == "7b":
            rows = targets(found)
    Console(stderr=True, width=None if sys.stderr.isatty() else 120).print(table)
    show(rows, as_json=args.json)


if __name__ == "__main__":
    main()

"""From which ratio dropping layers pays on this machine: prompt and generation, dense against pruned, by batch.

    python benchmarks/hardware.py [--shape 135m] [--batch 1,64] [--prompt 32] [--new 8] [--rounds 6] [--json]

A Llama of the shape with random weights: speed does not depend on what they say, nor on which layers are missing. All
ratios take turns, so that a busy minute hits each of them; medians. The limit is Amdahl's: what would be left if a
dropped layer took all of its time along, by the time of the model without any layer. Prints a table in Markdown.
"""

import argparse
import statistics
import time
from collections import defaultdict

import torch
from _models import SHAPES, llama_config
from _rows import row, show
from tqdm import tqdm
from transformers import LlamaForCausalLM

from tsp.evaluation.speed import wait

RATIOS = (0.0, 0.125, 0.25, 0.375, 0.5, 1.0)
TARGET = 0.97
"""Of the limit, at a quarter of the layers."""


def build(shape: str, positions: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    config = llama_config(shape, positions)
    with torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


def seconds(model: LlamaForCausalLM, tokens_BT: torch.Tensor, num_new: int) -> tuple[float, float]:
    """Of a prompt, and of one new token after it."""
    times = [clock(tokens_BT.device)]
    cache, step_BT = None, tokens_BT
    with torch.no_grad():
        for _ in range(1 + num_new):
            out = model(step_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step_BT = out.past_key_values, out.logits.argmax(-1)
            times.append(clock(tokens_BT.device))
    return times[1] - times[0], (times[-1] - times[1]) / num_new


def clock(device: torch.device) -> float:
    wait(device)
    return time.perf_counter()


def measure(model: LlamaForCausalLM, tokens_BT: torch.Tensor, num_new: int, rounds: int) -> dict:
    """Median seconds of (prompt, token) for each ratio."""
    whole = model.model.layers
    found = defaultdict(list)
    for number in tqdm(range(1 + rounds), desc=f"batch {len(tokens_BT)}", unit="round", leave=False):
        for ratio in RATIOS:
            model.model.layers = whole[: len(whole) - round(ratio * len(whole))]
            model.config.num_hidden_layers = len(model.model.layers)
            measured = seconds(model, tokens_BT, num_new)
            if number:  # The first round warms up.
                found[1 - len(model.model.layers) / len(whole)].append(measured)
    model.model.layers, model.config.num_hidden_layers = whole, len(whole)
    return {ratio: tuple(map(statistics.median, zip(*rows, strict=True))) for ratio, rows in found.items()}


def table_of(batch: int, num_prompt: int, found: dict) -> list[dict]:
    """Times as fast as the dense model, and the limit, for each ratio that leaves a model."""
    rows = []
    for ratio in [*found][:-1]:
        row = {"batch": batch, "ratio": ratio}
        for kind, number, tokens in (("prompt", 0, batch * num_prompt), ("generation", 1, batch)):
            dense_s, empty_s = found[0.0][number], found[1.0][number]
            row[f"{kind}_tokens_per_s"] = tokens / found[ratio][number]
            row[f"{kind}_speedup"] = dense_s / found[ratio][number]
            row[f"{kind}_limit"] = dense_s / (dense_s - ratio * (dense_s - empty_s))
        rows.append(row)
    return rows


def print_markdown(rows: list[dict]) -> None:
    print("| batch | dropped | prompt, tokens/s | times dense | limit | generation, tokens/s | times dense | limit |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for one in rows:
        cells = [f"{one['batch']}", f"{100 * one['ratio']:.1f} %"]
        for kind in ("prompt", "generation"):
            cells += [f"{one[f'{kind}_tokens_per_s']:,.1f}", f"{one[f'{kind}_speedup']:.2f}"]
            cells += [f"{one[f'{kind}_limit']:.2f}"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--batch", default="1,64", help="sequences at once, a comma list")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=8, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=6, help="after one to warm up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = build(args.shape, args.prompt + args.new, device, dtype)
    rows = []
    for batch in map(int, args.batch.split(",")):
        tokens_BT = torch.randint(model.config.vocab_size, (batch, args.prompt), device=device)
        rows += table_of(batch, args.prompt, measure(model, tokens_BT, args.new, args.rounds))
    if not args.json:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"{args.shape}, {name}, {str(dtype).removeprefix('torch.')}, {args.prompt} + {args.new} tokens\n")
        print_markdown(rows)
        return
    quarter = min((one["ratio"] for one in rows), key=lambda ratio: abs(ratio - 0.25))
    checks = [
        row(
            f"{kind}_speedup_of_limit_batch_{one['batch']}", one[f"{kind}_speedup"] / one[f"{kind}_limit"], ">=", TARGET
        )
        for one in rows
        if one["ratio"] == quarter
        for kind in ("prompt", "generation")
    ]
    show(checks, as_json=True)


if __name__ == "__main__":
    main()

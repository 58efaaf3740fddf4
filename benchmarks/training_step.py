"""What the platform costs beside the mathematics: its training steps against a bare PyTorch loop of the same.

    python benchmarks/training_step.py [--tokens 8192,2048] [--rounds 10] [--json]

The product trains the demo model as in a job: under DeepSpeed's ZeRO-3 on one rank, with gates, checks of the numbers,
and an MLflow run. Between two of its steps the bare loop does one of its own: hooks for the gates, a deep copy for the
teacher, `torch.optim.AdamW`, and nothing else. So a busy minute hits both. The figure is the median over the rounds of
the bare step's time in the product's, which is its share of the bare loop's tokens/s.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _jobs import job_of, settings
from _rows import row, show
from torch import Tensor, nn

from tsp.engine import Engine
from tsp.job import Job
from tsp.methods.trsp import stage1, stage2
from tsp.pipeline import make_bench
from tsp.shared import Shared, Stopwatch
from tsp.tracking.run import start_run

BLOCK_TOKENS = 256
DOOMED = (5, 8, 10, 12)
TARGETS = {"stage1": 0.95, "stage2_full": 0.90, "stage2_lora": 0.90}
WARM_UP = 2
"""Rounds that are not counted."""

Step = Callable[[Tensor], None]


def job_for(num_tokens: int, kind: str, rounds: int) -> Job:
    steps = rounds + WARM_UP + 1
    return job_of(
        *settings(
            train__batch_size=num_tokens // BLOCK_TOKENS,
            stage1__schedule="budget",
            stage1__steps=steps,
            stage2__steps=steps,
            stage2__lr=1e-4,
            stage2__trainable=kind.partition("_")[2] or "lora",
        )
    )


def bare_stage1(model: nn.Module) -> Step:
    """Gradient descent on residual gates."""
    gates = torch.ones(len(model.model.layers), requires_grad=True)
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, args, out, index=index: torch.lerp(args[0], out, gates[index]))

    def step(tokens_BT: Tensor) -> None:
        cross_entropy(model(tokens_BT, use_cache=False).logits, tokens_BT).backward()
        with torch.no_grad():
            gates.sub_(0.01 * gates.grad).clamp_(0, 1)
        gates.grad = None

    return step


def bare_stage2(model: nn.Module, trainable: str) -> Step:
    """Drop, then AdamW on a tenth of the cross-entropy and the distances to a dense copy: of outputs, hidden states."""
    teacher = copy.deepcopy(model).eval()
    kept = [index for index in range(len(model.model.layers)) if index not in DOOMED]
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in kept)
    places = [*kept, len(teacher.model.layers)]
    ours, dense = inputs_noted(model), inputs_noted(teacher)
    if trainable == "full":
        model.requires_grad_(True)
    else:
        from peft import LoraConfig, inject_adapter_in_model

        names = [name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)]
        targets = [f"model.layers.{name}" for name in names]
        inject_adapter_in_model(LoraConfig(r=32, lora_alpha=64, target_modules=targets, lora_dropout=0.0), model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=0.0)

    def step(tokens_BT: Tensor) -> None:
        ours.clear()
        dense.clear()
        with torch.no_grad():
            dense_NV = F.log_softmax(teacher(tokens_BT, use_cache=False).logits.flatten(0, 1), dim=-1)
        logits_BTV = model(tokens_BT, use_cache=False).logits
        pruned_NV = F.log_softmax(logits_BTV.flatten(0, 1), dim=-1)
        distance = F.kl_div(pruned_NV, dense_NV, log_target=True, reduction="batchmean")
        gaps = [relative_distance(h, dense[place]) for h, place in zip(ours[1:], places[1:], strict=True)]
        (0.1 * cross_entropy(logits_BTV, tokens_BT) + distance + 3 * torch.stack(gaps).mean()).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inputs_noted(model: nn.Module) -> list[Tensor]:
    """What each pass gives the layers and the final norm will be put into it."""
    found: list[Tensor] = []
    for place in (*model.model.layers, model.model.norm):
        place.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    return found


def relative_distance(hidden_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    return ((hidden_BTD - dense_BTD).square().sum(dim=-1) / dense_BTD.square().sum(dim=-1)).mean()


def cross_entropy(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def seconds_of(kind: str, num_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Of each counted round: `product` and `bare`."""
    job = job_for(num_tokens, kind, rounds)
    engine = Engine.start(job.config, job.sharding)
    tracker = start_run(Path.cwd(), experiment="benchmark", run_name=kind, tags={}, params={})
    bench = make_bench(job, engine, tracker, shared=Shared(), watch=Stopwatch())
    bare_model = plain_copy(job, engine)
    bare = bare_stage1(bare_model) if kind == "stage1" else bare_stage2(bare_model, kind.partition("_")[2])
    tokens_BT = job.calibration.blocks[: num_tokens // BLOCK_TOKENS]
    found: dict[str, list[float]] = {"product": [], "bare": []}
    last = time.perf_counter()

    def between_steps(*_: Any) -> None:
        nonlocal last
        found["product"].append(time.perf_counter() - last)
        started = time.perf_counter()
        bare(tokens_BT)
        last = time.perf_counter()
        found["bare"].append(last - started)

    bench.after_step = between_steps
    if kind == "stage1":
        with engine.mounted(bench.decoder.model) as bench.model:
            stage1.score(bench, len(DOOMED))
    else:
        stage2.transfer(bench, DOOMED, save_dtype=job.source.dtype)
    tracker.finish("FINISHED")
    return {who: times[WARM_UP:] for who, times in found.items()}


def plain_copy(job: Job, engine: Engine) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.source.folder, dtype=engine.dtype).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8192,2048", help="tokens a step, a comma list; the first is judged")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kinds", default=",".join(TARGETS), help="a comma list")
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    judged, *others = map(int, args.tokens.split(","))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind in args.kinds.split(","):
            for num_tokens in (judged, *others):
                times = seconds_of(kind, num_tokens, args.rounds)
                share = statistics.median(b / p for p, b in zip(times["product"], times["bare"], strict=True))
                speed = num_tokens / statistics.median(times["product"])
                print(
                    f"{kind} at {num_tokens} tokens: {share:.3f} of the bare loop, {speed:,.0f} tokens/s",
                    file=sys.stderr,
                )
                if num_tokens == judged:
                    rows.append(row(f"{kind}_share_of_bare_loop", share, ">=", TARGETS[kind]))
    show(rows, as_json=args.json)


if __name__ == "__main__":
    main()

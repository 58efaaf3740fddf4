"""What `test_ranks` runs on one rank and on two: by name, for `worker.py` to read from a file."""

import json
from pathlib import Path

import torch

from tests.models import REPOSITORY

LAYERS, DOOMED = 4, (1, 2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STAGES = (2, 3)
START_GATES = [0.5, 0.7, 0.9, 1.0]
AUTO = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def zero(stage: int, **more) -> dict:
    """A DeepSpeed JSON that really shards so small a model.

    Without a bucket size DeepSpeed takes 2 GB per rank, and deterministic torch fills them at every step.
    """
    sizes = (
        dict.fromkeys(AUTO, "auto") | {"stage3_param_persistence_threshold": 100} if stage == 3 else {AUTO[0]: "auto"}
    )
    return {"zero_optimization": {"stage": stage, **sizes, **more}}


def shipped(name: str, nvme: Path) -> dict:
    content = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    for part in ("offload_param", "offload_optimizer"):
        if "nvme_path" in content["zero_optimization"].get(part, {}):
            content["zero_optimization"][part]["nvme_path"] = str(nvme)
    return content


# All gates fall under a heavy penalty, so the loss moves a lot.
FALLING = {
    "stage1__schedule": "one-shot",
    "stage1__lambda1": 1.0,
    "stage1__steps": 6,
    "stage1__lr": 0.1,
    "train__batch_size": 16,
}
BUDGET = {"stage1__schedule": "budget", "stage1__steps": 10, "stage1__lr": 0.1, "train__batch_size": 8}
LORA = {"stage2__trainable": "lora", "stage2__steps": 8, "stage2__lr": 1e-2, "stage2__lora": {"rank": 4, "alpha": 8.0}}
FULL = {"stage2__trainable": "full", "stage2__steps": 6, "stage2__lr": 5e-3, "stage2__hidden": 3.0}
ANNEAL = {
    "stage2__gates": "anneal",
    "stage2__lambda2": 0.01,
    "stage2__task": {"lm": 0.1, "distill": 1.0},
    "stage2__hidden": 3.0,
}


SOME = [(2, "fp32"), (3, "fp32"), (3, "bf16")]
SELECTIONS = ("tsp", "sleb", "taylor", "laco")
FOLDS = ("merge", "replaceme")
ON_ONE_RANK = (
    *("ranks", "falling-zero3-fp32", "budget-zero2-fp32", "lora-zero3-fp32", "full-zero2-fp32"),
    *("gap-token-sum", "gap-frobenius"),
    *(f"{name}-zero2" for name in (*SELECTIONS, *FOLDS, "peak-lora", "peak-full")),
)


def case(kind: str, model: str, ds: dict, settings: dict, **more) -> dict:
    return {"kind": kind, "model": model, "ds": ds, "settings": settings, **more}


def plan(num_ranks: int) -> dict[str, dict]:
    """The cases of one start."""
    found = {"ranks": case("ranks", "plain", zero(2), {})}
    for stage in STAGES:
        for dtype in DTYPES:
            key, kind = f"zero{stage}-{dtype}", {"model__dtype": dtype}
            found[f"falling-{key}"] = case("select", "plain", zero(stage), kind | FALLING, num_drop=2)
            found[f"lora-{key}"] = case("move", "plain", zero(stage), kind | LORA | ANNEAL, doomed=DOOMED)
            if (stage, dtype) in SOME:
                found[f"budget-{key}"] = case("select", "identities", zero(stage), kind | BUDGET, num_drop=2)
                found[f"full-{key}"] = case("move", "plain", zero(stage), kind | FULL, doomed=DOOMED)
    again, split = {"train__activation_checkpointing": True}, {"train__accumulation": 2}
    found["again-falling"] = case("select", "plain", zero(3), again | FALLING, num_drop=2)
    found["again-lora"] = case("move", "plain", zero(3), again | LORA | ANNEAL, doomed=DOOMED)
    for reduction in ("token-sum", "frobenius"):
        as_paper = {"stage2__gates": "hold", "stage2__lambda2": 0.01, "stage2__lambda2_unit": "one", "stage2__steps": 1}
        found[f"gap-{reduction}"] = case(
            "move", "plain", zero(2), LORA | as_paper | {"stage2__gap_reduction": reduction}, doomed=DOOMED
        )
    found["split-lora"] = case("move", "plain", zero(3), split | LORA | ANNEAL, doomed=DOOMED)
    settings = {"train__batch_size": 6, "eval__batch_size": 3, "prune__score_blocks": 13}
    for stage in STAGES:
        for name in SELECTIONS:
            found[f"{name}-zero{stage}"] = case("select", "plain", zero(stage), settings, method=name, num_drop=2)
        for name in FOLDS:
            found[f"{name}-zero{stage}"] = case("move", "plain", zero(stage), settings, transfer=name, doomed=DOOMED)
        for name in ("lora", "full"):
            # The doomed layers may train, and get no gradient where the learning rate is found.
            first_step = ANNEAL | {"stage2__trainable": name, "stage2__steps": 1, "stage2__lambda2": 0.0}
            found[f"peak-{name}-zero{stage}"] = case("move", "plain", zero(stage), first_step, doomed=DOOMED)
        # Two micro-batches a step, of which the second rank's second, or all from the second step on, are NaN.
        for name, num_steps, bad in (("whole", 1, []), ("half", 1, [1]), ("none", 2, [2, 3]), ("row", 6, range(2, 12))):
            halves = {"train__accumulation": 2, "train__batch_size": 8}
            found[f"spoilt-{name}-zero{stage}"] = case(
                "spoilt", "plain", zero(stage), halves, num_steps=num_steps, bad=list(bad)
            )
    found["clock"] = case("clock", "plain", zero(3), LORA | {"budget_s": 1.0}, doomed=DOOMED)
    if num_ranks == 1:
        found = {name: found[name] for name in ON_ONE_RANK}
    for placement in ("residual", "output"):
        settings = {"train__batch_size": 16}
        found[f"gradient-{placement}"] = case(
            "gradient", "plain", zero(3), settings, placement=placement, gates=START_GATES
        )
    settings = {"train__batch_size": 16, "train__accumulation": 2}
    found["gradient-replies"] = case(
        "gradient", "plain", zero(3), settings, placement="residual", gates=START_GATES, text="replies"
    )
    return found

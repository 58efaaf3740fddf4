"""tsp's paper preset equals a plain PyTorch reference, step by step, on a tiny Llama.

Tolerances: the two add in another order, so fp32 rounding (1e-7 a step) grows over the steps; Adam passes it on.
"""

import copy
import functools

import pytest
import torch

from tests.golden import trsp_reference as reference
from tests.models import bench, tiny_model, tokens
from tsp.config import load_config, nest
from tsp.methods import preset
from tsp.methods.trsp import stage1, stage2
from tsp.selection import cut

LAYERS, NUM_DROP, SEED = 5, 2, 3
STEPS_1, STEPS_2 = 6, 12


@functools.cache
def paper(**changes):
    """The preset with fewer steps."""
    few = {"stage1.steps": STEPS_1, "stage2.steps": STEPS_2, "stage2.lora.rank": 4, "train.batch_size": 8, "seed": SEED}
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config([preset("trsp"), *(nest(key, value) for key, value in (few | changed).items())])


def blocks():
    return tokens(20, 14)


@functools.cache
def ours_1():
    made = bench(tiny_model(num_layers=LAYERS), blocks(), paper())
    with made.engine.mounted(made.decoder.model) as made.model:
        scores = stage1.score(made, NUM_DROP)
    return scores, made.tracker


@functools.cache
def theirs_1():
    model, config = tiny_model(num_layers=LAYERS), paper().stage1
    return reference.stage1(
        model,
        model.model.layers,
        blocks(),
        num_drop=NUM_DROP,
        lambda1=config.lambda1,
        lr=config.lr,
        steps=config.steps,
        size=8,
        seed=SEED,
    )


def test_the_preset_is_what_the_paper_says():
    config = paper()
    assert (config.stage1.placement, config.stage1.schedule, config.stage1.lambda1) == ("output", "greedy", 5e-3)
    assert (config.stage2.lambda2, config.stage2.gap_norm, config.stage2.gates) == (1e-3, "l2", "hold")
    assert (config.stage2.task.lm, config.stage2.task.distill) == (1, 0)


def test_stage_1_gates_and_losses_of_every_step():
    (_, tracker), (_, trace) = ours_1(), theirs_1()
    assert len(trace) == NUM_DROP * STEPS_1
    gates = torch.tensor([row[0] for row in trace])
    assert (gates[-1] - 1).abs().max() > 0.03, "something moved"
    assert torch.allclose(tracker.gates("stage1", LAYERS), gates, atol=2e-5)
    assert tracker.series("stage1/loss/total") == pytest.approx([row[1] for row in trace], rel=1e-5)
    assert tracker.series("stage1/loss/lm") == pytest.approx([row[2] for row in trace], rel=1e-5)


def test_stage_1_dooms_the_same_layers_in_the_same_order():
    (scores, _), (doomed, _) = ours_1(), theirs_1()
    assert list(scores.order[:NUM_DROP]) == doomed
    assert cut(scores.order, NUM_DROP) == tuple(sorted(doomed))


def adapters_of(model, config) -> dict:
    """The adapters' start values by the name of the weight they belong to."""
    scale, found = config.stage2.lora.alpha / config.stage2.lora.rank, {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            pair = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            found[f"{name}.weight"] = (*(weight.detach().clone() for weight in pair), scale)
    return found


@pytest.mark.parametrize(
    ("trainable", "lr", "lambda2"), [("lora", 1e-3, 1e-3), ("lora", 1e-2, 0.5), ("full", 1e-3, 0.1)]
)
def test_stage_2_losses_gaps_and_final_weights(trainable, lr, lambda2, monkeypatch):
    config = paper(stage2__trainable=trainable, stage2__lr=lr, stage2__lambda2=lambda2)
    doomed, made, start = (1, 3), bench(tiny_model(num_layers=LAYERS), blocks(), config), {}
    real = stage2.add_adapters

    def noting_the_start(decoder, *arguments):
        real(decoder, *arguments)
        start.update(adapters_of(decoder.model, config))

    monkeypatch.setattr(stage2, "add_adapters", noting_the_start)
    stage2.transfer(made, doomed, save_dtype=torch.float32)
    model = tiny_model(num_layers=LAYERS)
    weights, trace = reference.stage2(
        model,
        model.model.layers,
        blocks(),
        doomed,
        adapters=start or None,
        lambda2=lambda2,
        lr=lr,
        warmup=config.stage2.warmup_share,
        clip=config.stage2.clip,
        steps=STEPS_2,
        size=8,
        # Stage 2 goes through the text in another order than stage 1.
        seed=SEED + 1,
    )
    assert bool(start) == (trainable == "lora")
    for column, name in enumerate(("total", "lm", "gap")):
        expected = [row[column] for row in trace]
        assert made.tracker.series(f"stage2/loss/{name}") == pytest.approx(expected, rel=2e-4), name
    for index in doomed:
        gaps = [row[3][index] for row in trace]
        assert made.tracker.series(f"stage2/gap/layer_{index:03d}") == pytest.approx(gaps, rel=2e-4)
    moved, differing, count = 0.0, 0, 0
    dense = copy.deepcopy(model).state_dict()
    for name, weight in made.decoder.model.state_dict().items():
        moved = max(moved, (weights[name] - dense[name]).abs().max().item())
        # Where a gradient is rounding noise, Adam's step of size lr may go either way: a few weights in a thousand.
        differing += ((weight - weights[name]).abs() > 0.05 * lr).sum().item()
        count += weight.numel()
        assert (weight - weights[name]).abs().max() < 2 * STEPS_2 * lr
    assert moved > 3 * lr
    assert differing < 0.005 * count

"""Drop, then train: the controls are stage 2 without gates and penalty, and train what a smaller model would be."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.models import bench, job, logits, sample, tiny_model, without_layers
from tsp.methods import transfer_verb

DOOMED = (1, 3)
STEPS = 6


def trained(transfer, **settings):
    model = tiny_model()
    text = sample(model, 16, 12)
    full = {"stage2__trainable": "full", "stage2__steps": STEPS, "stage2__lr": 1e-3, "stage2__clip": None}
    made = bench(model, text, job(**full | settings))
    transfer_verb(transfer)(made, DOOMED, save_dtype=torch.float32)
    return made


@pytest.mark.parametrize(("transfer", "task"), [("finetune", {"lm": 1.0}), ("distill", {"distill": 1.0})])
def test_a_control_is_stage_2_with_closed_gates_and_no_penalty_whatever_the_preset_says(transfer, task):
    other = {"stage2__lambda2": 0.7, "stage2__gates": "anneal", "stage2__task": {"lm": 0.3, "distill": 0.3}}
    control = trained(transfer, **other, stage2__hidden=3.0)
    same = trained("stage2", stage2__gates="off", stage2__hidden=0.0, stage2__task={"lm": 0.0, "distill": 0.0} | task)
    assert control.config.stage2.lambda2 == 0.7, "the bench is left as it was"
    for name, weight in control.decoder.model.state_dict().items():
        assert torch.equal(weight, same.decoder.model.state_dict()[name]), name


def test_finetune_trains_the_model_that_is_built_without_the_layers():
    """Against plain PyTorch: a smaller model, the same batches, AdamW, the same schedule."""
    from tsp.methods.trsp.stage2 import learning_rate
    from tsp.training import step_indices

    made = trained("finetune")
    stage2 = made.config.stage2
    smaller = copy.deepcopy(without_layers(tiny_model(), DOOMED, "model.layers")).requires_grad_(True)
    optimizer = torch.optim.AdamW(smaller.parameters(), weight_decay=0.0)
    for step in range(STEPS):
        tokens = made.blocks_NT[step_indices(16, 8, step, seed=1)]
        loss = F.cross_entropy(smaller(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, stage2.steps, stage2.lr, stage2.warmup_share)
        optimizer.step()
        optimizer.zero_grad()
    with made.decoder.bypassing(DOOMED):
        found = logits(made.decoder.model, made.blocks_NT[:2])
    assert torch.allclose(found, logits(smaller, made.blocks_NT[:2]), atol=1e-4)
    untrained = logits(without_layers(tiny_model(), DOOMED, "model.layers"), made.blocks_NT[:2])
    assert not torch.allclose(found, untrained, atol=1e-3)

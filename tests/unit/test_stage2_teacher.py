"""Stage 2 learns from the dense model, which stays as it is: its outputs, its hidden states."""

import copy

import pytest
import torch

from tests.models import bench, distillation_loss, job, logits, tiny_model, tokens, without_layers
from tests.transfers import DOOMED, LAYERS, distillation, plain, transferred
from tsp.methods.trsp import stage2
from tsp.methods.trsp.stage2 import learning_rate, transfer
from tsp.training import step_indices


def inputs_of(model, tokens_BT):
    """What each layer, and the final norm, is given."""
    found = []
    places = (*model.model.layers, model.model.norm)
    hooks = [place.register_forward_pre_hook(lambda _, args: found.append(args[0])) for place in places]
    model(input_ids=tokens_BT)
    for hook in hooks:
        hook.remove()
    return found


def relative_distance(smaller, dense, tokens_BT):
    with torch.no_grad():
        taught = inputs_of(dense, tokens_BT)
    taught = [taught[index] for index in range(LAYERS + 1) if index not in DOOMED]
    pairs = list(zip(inputs_of(smaller, tokens_BT), taught, strict=True))[1:]
    ratios = [((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)) ** 2 for ours, theirs in pairs]
    return torch.stack(ratios).mean()


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_hidden_states_start_where_those_of_the_smaller_model_are_and_come_nearer(trainable, accumulation):
    dense, blocks = tiny_model(num_layers=LAYERS), tokens(32, 12)
    made = transferred(
        blocks=blocks, stage2__trainable=trainable, stage2__hidden=10.0, stage2__lr=5e-3, stage2__steps=20,
        stage2__task={"lm": 0.0, "distill": 0.0}, train__batch_size=32, train__accumulation=accumulation,
    )  # fmt: skip
    losses = made.tracker.series("stage2/loss/hidden")
    assert losses[0] == pytest.approx(
        relative_distance(without_layers(dense, DOOMED, "model.layers"), dense, blocks).item(), rel=1e-5
    )
    assert losses[-1] < 0.8 * losses[0]
    after = relative_distance(without_layers(made.decoder.model, DOOMED, "model.layers"), dense, blocks)
    assert after.item() == pytest.approx(losses[-1], rel=0.05), "one step later"
    assert not made.tracker.series("stage2/loss/distill")
    assert plain(made)


def test_hidden_states_are_learned_as_in_plain_pytorch():
    dense, blocks, steps = tiny_model(num_layers=LAYERS), tokens(16, 12), 5
    made = transferred(
        blocks=blocks, stage2__trainable="full", stage2__hidden=10.0, stage2__lr=1e-3, stage2__steps=steps,
        stage2__task={"lm": 0.0, "distill": 1.0}, stage2__clip=None,
    )  # fmt: skip
    smaller = copy.deepcopy(without_layers(dense, DOOMED, "model.layers")).requires_grad_(True)
    optimizer = torch.optim.AdamW(smaller.parameters(), weight_decay=0.0)
    for step in range(steps):
        batch = blocks[step_indices(16, 8, step, seed=1)]
        loss = distillation_loss(smaller(input_ids=batch).logits, logits(dense, batch))
        (loss + 10 * relative_distance(smaller, dense, batch)).backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 1e-3, made.config.stage2.warmup_share)
        optimizer.step()
        optimizer.zero_grad()
    with made.decoder.bypassing(DOOMED):
        found = logits(made.decoder.model, blocks[:2])
    assert torch.allclose(found, logits(smaller, blocks[:2]), atol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_teacher_and_student_do_not_make_zero_3_forget_the_order_of_each_other(accumulation, monkeypatch):
    """What it forgets does not grow with the steps, and the weights are those without sharding."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    forget, weights = Coordinator._invalidate_trace, {}
    forgotten = []

    def counted(coordinator):
        forgotten.append(coordinator)
        return forget(coordinator)

    monkeypatch.setattr(Coordinator, "_invalidate_trace", counted)
    numbers = []
    for stage, steps in ((3, 2), (3, 6), (0, 6)):
        forgotten.clear()
        settings = {"stage2__steps": steps, "stage2__lr": 1e-2, "train__accumulation": accumulation}
        made = bench(tiny_model(num_layers=LAYERS), tokens(32, 12), job(stage2__trainable="lora", **settings), stage)
        transfer(made, DOOMED, save_dtype=torch.float32)
        numbers.append(len(forgotten))
        parameters = list(made.decoder.model.parameters())
        with made.engine.gathered(parameters):
            weights[stage] = [parameter.detach().clone() for parameter in parameters]
    assert numbers[0] == numbers[1]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(weights[3], weights[0], strict=True))


def test_the_first_loss_of_distillation_is_that_of_the_bare_drop_and_zero_while_all_gates_are_open():
    settings = {"train__batch_size": 32, "stage2__steps": 1}
    off = transferred(stage2__gates="off", **settings).tracker.series("stage2/loss/distill")[0]
    assert off == pytest.approx(distillation(transferred(stage2__steps=0)), rel=1e-4)
    assert transferred(stage2__gates="hold", **settings).tracker.series("stage2/loss/distill")[0] == 0


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_teacher_stays_the_dense_model_bit_for_bit(trainable, monkeypatch):
    dense, seen = tiny_model(num_layers=LAYERS), []
    real = stage2.task_loss

    def watching(student, *rest, teacher_BTV, **options):
        seen.append((student.detach().clone(), teacher_BTV.clone()))
        assert not teacher_BTV.requires_grad
        return real(student, *rest, teacher_BTV=teacher_BTV, **options)

    monkeypatch.setattr(stage2, "task_loss", watching)
    blocks = tokens(8, 12)
    transferred(blocks=blocks, stage2__trainable=trainable, stage2__gates="anneal", stage2__lr=1e-2, stage2__steps=6)
    expected = {row.sum().item(): row for row in logits(dense, blocks)}
    assert len(seen) == 6
    for _, teacher in seen:
        # The order of the sequences changes from epoch to epoch.
        assert all(torch.equal(row, expected[row.sum().item()]) for row in teacher)
    assert not torch.equal(seen[0][0], seen[-1][0])

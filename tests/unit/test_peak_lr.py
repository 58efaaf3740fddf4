"""The learning rate that is not given: against plain autograd, and whether it does what it promises."""

import pytest
import torch
import torch.nn.functional as F

from tests.models import bench, job, logits, make_identity, tiny_model, tokens
from tsp.decoder import find_decoder
from tsp.errors import NumbersError
from tsp.methods.trsp import peak_lr as peak_lr_module
from tsp.methods.trsp.peak_lr import NOTHING_LOST, peak_lr
from tsp.methods.trsp.stage2 import transfer
from tsp.training import step_indices

LAYERS, DOOMED = 4, (1, 2)


def found(model=None, doomed=DOOMED, blocks=None, order=None, **settings):
    blocks = tokens(32, 12) if blocks is None else blocks
    made = bench(model or tiny_model(num_layers=LAYERS), blocks, job(**settings))
    made.decoder.model.requires_grad_(True)
    for index in doomed:
        made.decoder.layers[index].requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        if order is not None:
            patch.setattr("tsp.training.step_indices", lambda *_, **__: order)
        return peak_lr(made, doomed), made


def by_hand(lm: float, distill: float) -> float:
    """(task of the pruned - task of the dense model) / sum of |gradient|, on the first step's sequences."""
    model, blocks = tiny_model(num_layers=LAYERS).requires_grad_(True), tokens(32, 12)
    batch = blocks[step_indices(32, 8, 0, seed=1)]
    dense = logits(model, batch)
    with find_decoder(model).bypassing(DOOMED):
        pruned = model(input_ids=batch, use_cache=False).logits
    wanted = batch[:, 1:].flatten()
    excess = F.cross_entropy(pruned[:, :-1].flatten(0, 1), wanted) - F.cross_entropy(
        dense[:, :-1].flatten(0, 1), wanted
    )
    kl = (dense.softmax(-1) * (dense.log_softmax(-1) - pruned.log_softmax(-1))).sum(-1).mean()
    task = lm * excess + distill * kl
    weights = [weight for name, weight in model.named_parameters() if not any(f"layers.{i}." in name for i in DOOMED)]
    norm = sum(gradient.abs().sum() for gradient in torch.autograd.grad(task, weights))
    return (task / norm).item()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("lm", "distill"), [(0.0, 1.0), (0.1, 1.0)])
def test_it_is_what_plain_autograd_gives(lm, distill, accumulation):
    task = {"lm": lm, "distill": distill}
    lr, made = found(stage2__task=task, stage2__lr_scale=3.0, train__accumulation=accumulation)
    assert lr == pytest.approx(3 * by_hand(lm, distill), rel=1e-4)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in made.decoder.model.parameters())


@pytest.mark.parametrize("bad", [0, 1])
def test_a_micro_batch_that_is_not_finite_is_left_out(bad, monkeypatch):
    """The other one stands in for it, as in training."""
    calls, real = [], peak_lr_module.task_loss

    def spoilt(logits_BTV, *given, **options):
        calls.append(logits_BTV)
        task = real(logits_BTV, *given, **options)
        return task._replace(total=task.total * float("nan")) if len(calls) - 1 == bad else task

    monkeypatch.setattr(peak_lr_module, "task_loss", spoilt)
    lr, _ = found(train__accumulation=2)
    blocks, first = tokens(32, 12), step_indices(32, 8, 0, seed=1)
    half = first.chunk(2)[1 - bad]
    monkeypatch.setattr(peak_lr_module, "task_loss", real)
    alone, _ = found(blocks=blocks[torch.cat([half, half])], order=torch.arange(8))
    assert lr == pytest.approx(alone, rel=1e-4)


def test_where_no_micro_batch_is_finite_it_says_where_that_comes_from():
    """No rate that is made up: with gates that hold, the training itself would have found nothing wrong."""
    model = tiny_model(num_layers=LAYERS)
    with torch.no_grad():
        model.model.layers[DOOMED[-1] + 1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumbersError, match="without the doomed layers the loss is not finite .*: layer 3 is the first"):
        transfer(bench(model, tokens(32, 12), job()), DOOMED, save_dtype=torch.float32)


def test_a_step_of_that_length_against_the_signs_wins_back_about_the_whole_loss():
    """As far as the loss is linear; a hundredth of the step wins a hundredth of it."""
    lr, made = found(stage2__lr_scale=0.01)
    batch = made.blocks_NT[step_indices(32, 8, 0, seed=1)]
    model, task = made.decoder.model, made.config.stage2.task
    dense = logits(tiny_model(num_layers=LAYERS), batch)

    def loss():
        with made.decoder.bypassing(DOOMED):
            pruned = model(input_ids=batch, use_cache=False).logits
        kl = F.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        return task.distill * kl + task.lm * F.cross_entropy(pruned[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    floor = task.lm * F.cross_entropy(dense[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    before = loss()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad.sign()
        won = before - loss()
    assert won.item() == pytest.approx(0.01 * (before - floor).item(), rel=0.15)


def test_where_nothing_is_lost_it_is_a_fixed_one():
    model = tiny_model(num_layers=LAYERS)
    make_identity(find_decoder(model), *DOOMED)
    assert found(model, stage2__task={"lm": 0.0, "distill": 1.0})[0] == NOTHING_LOST


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_stage_2_takes_it_and_tells_it(trainable):
    made = bench(tiny_model(num_layers=LAYERS), tokens(32, 12), job(stage2__trainable=trainable, stage2__steps=3))
    assert made.config.stage2.lr is None
    transfer(made, DOOMED, save_dtype=torch.float32)
    told = set(made.tracker.series("stage2/peak_lr"))
    assert len(told) == 1
    again = bench(
        tiny_model(num_layers=LAYERS),
        tokens(32, 12),
        job(stage2__trainable=trainable, stage2__steps=3, stage2__lr=told.pop()),
    )
    transfer(again, DOOMED, save_dtype=torch.float32)
    first, second = (each.decoder.model.state_dict() for each in (made, again))
    assert all(torch.equal(first[name], second[name]) for name in first), "as if it had been given"

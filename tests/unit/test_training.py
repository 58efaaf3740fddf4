"""The one loop: which sequences a step sees, how micro-batches and ranks add up."""

import itertools
import weakref

import pytest
import torch

from tests.models import engine, job, tiny_model, tokens
from tsp.decoder import find_decoder
from tsp.engine import Engine
from tsp.gates import Gates
from tsp.losses import lm_loss
from tsp.mounted import Mounted
from tsp.sharding import AdamW
from tsp.training import _mine, step_indices, train, usable


@pytest.mark.parametrize(("num_blocks", "batch_size"), [(12, 4), (10, 4), (3, 8), (7, 7)])
def test_every_epoch_is_a_permutation_and_epochs_join_without_a_gap(num_blocks, batch_size):
    num_steps = 3 * num_blocks
    seen = torch.cat([step_indices(num_blocks, batch_size, step, seed=5) for step in range(num_steps)])
    epochs = seen[: len(seen) // num_blocks * num_blocks].view(-1, num_blocks)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(num_blocks))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1, "each in another order"


def test_the_order_depends_on_the_seed_alone():
    first = [step_indices(50, 8, step, seed=1) for step in range(4)]
    torch.manual_seed(99)
    torch.rand(10)
    assert all(torch.equal(step_indices(50, 8, step, seed=1), indices) for step, indices in enumerate(first))
    assert not torch.equal(step_indices(50, 8, 0, seed=2), first[0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_a_step_without_overlap(world_size):
    indices = step_indices(64, 8, step=3, seed=0)
    shares = [_mine(Engine(rank, world_size, None, None, {}, job().train), indices) for rank in range(world_size)]
    assert torch.equal(torch.cat(shares), indices)
    assert {len(share) for share in shares} == {8 // world_size}


def gradients(accumulation: int) -> tuple[torch.Tensor, float, int]:
    """Of the gates after one step of 8 sequences, the step's loss, and the number of forward passes."""
    config = job(train__accumulation=accumulation)
    own, decoder, calls = engine(config), find_decoder(tiny_model()), []
    gates = Gates(decoder)
    gates.values = torch.linspace(0.5, 1, 5).requires_grad_(True)
    with own.mounted(decoder.model) as model, gates.attached():

        def loss(ids, share):
            calls.append(len(ids))
            return {"total": lm_loss(model(ids), ids, share)}

        [stats] = train(own, model, tokens(16, 12), config.train, num_steps=1, seed=0, loss=loss)
    assert calls == [8 // accumulation] * accumulation
    return gates.values.grad, stats.losses["total"], stats.tokens


def test_what_is_left_out_lets_go_of_its_graph_before_the_next_pass():
    """Else a micro-batch that is not finite takes the memory of two."""
    kept = []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.append(weakref.ref(self))

    def loss(tokens_BT, share):
        assert not any(saved() is not None for saved in kept)
        weight = torch.ones(3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            return {"total": (weight**2 * float("nan")).sum()}

    batches = [(tokens(2, 8), 1.0)] * 3
    assert list(usable(engine(job()), batches, loss, left := [])) == []
    assert len(left) == len(kept) == 3


def test_accumulation_changes_neither_gradient_nor_loss():
    whole, loss, num_tokens = gradients(1)
    parts, parts_loss, parts_tokens = gradients(4)
    assert whole.abs().max() > 1e-3
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)
    assert loss == pytest.approx(parts_loss, rel=1e-6)
    assert num_tokens == parts_tokens == 8 * 12


def trained_weights(accumulation: int) -> torch.Tensor:
    config = job(train__accumulation=accumulation)
    own, model = engine(config), tiny_model(num_layers=2)
    model.requires_grad_(True)
    with own.mounted(model, AdamW(clip=1.0)) as trained:
        stats = train(
            own,
            trained,
            tokens(16, 12),
            config.train,
            num_steps=3,
            seed=0,
            loss=lambda ids, share: {"total": lm_loss(trained(ids), ids, share)},
            before_step=lambda step, num_steps: trained.set_lr(1e-3),
        )
        assert len(list(stats)) == 3
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_accumulation_changes_no_trained_weight():
    dense = torch.cat([parameter.flatten() for parameter in tiny_model(num_layers=2).parameters()])
    whole, parts = trained_weights(1), trained_weights(4)
    assert (whole - dense).abs().max() > 1e-3
    # Adam divides by a gradient's own size, so where that is rounding noise a weight may go either way.
    assert ((whole - parts).abs() > 1e-4).float().mean() < 0.01


def test_hooks_are_called_around_the_passes_and_losses_are_means():
    config, order = job(train__accumulation=2), []
    own, model = engine(config), tiny_model(num_layers=1)

    def loss(ids, share):
        order.append("loss")
        return {"total": ids.float().mean(), "half": ids.float().mean() / 2}

    blocks = tokens(8, 6)
    stats = train(
        own,
        Mounted(model, None, 2),
        blocks,
        config.train,
        num_steps=2,
        seed=0,
        loss=loss,
        before_step=lambda step, num_steps: order.append(f"before {step}"),
        after_step=lambda step: order.append(f"after {step}"),
    )
    losses = [step.losses for step in stats]
    assert order == ["before 0", "loss", "loss", "after 0", "before 1", "loss", "loss", "after 1"]
    assert losses[0] == pytest.approx({"total": blocks.float().mean().item(), "half": blocks.float().mean().item() / 2})


def test_a_training_in_seconds_ends_when_they_are_over(monkeypatch):
    """By a clock that is read three times a step, at an even pace."""
    clock = itertools.count()
    monkeypatch.setattr("tsp.training.time.perf_counter", lambda: next(clock) / 3)
    config, seen = job(), []
    stats = train(
        engine(config),
        Mounted(tiny_model(num_layers=1), None, 1),
        tokens(8, 6),
        config.train,
        num_steps=1000,
        seconds=20.0,
        seed=0,
        loss=lambda ids, share: {"total": ids.float().mean()},
        before_step=lambda step, num_steps: seen.append((step, num_steps)),
    )
    assert abs(len(list(stats)) - 20) <= 1
    # From the third step on the number of all steps is known, so a schedule can follow it.
    assert {num_steps for _, num_steps in seen[2:]} <= {len(seen) - 1, len(seen), len(seen) + 1}
    assert seen[-1][1] == len(seen)


def test_a_training_in_seconds_does_two_steps_at_least():
    config = job()
    stats = train(
        engine(config),
        Mounted(tiny_model(num_layers=1), None, 1),
        tokens(8, 6),
        config.train,
        num_steps=1000,
        seconds=1e-9,
        seed=0,
        loss=lambda ids, share: {"total": ids.float().mean()},
    )
    assert len(list(stats)) == 2

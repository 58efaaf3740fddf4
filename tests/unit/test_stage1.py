"""Stage 1 dooms what does nothing: two layers that are exact identities by construction."""

import functools

import pytest
import torch

from tests.models import bench, job, make_identity, sample, tiny_model, tokens
from tsp.decoder import find_decoder
from tsp.losses import lm_loss
from tsp.methods.trsp.stage1 import score
from tsp.selection import cut

LAYERS = 6
IDENTITIES = (1, 4)

SCHEDULES = {
    "budget": {"stage1__schedule": "budget", "stage1__steps": 30},
    "greedy": {"stage1__schedule": "greedy", "stage1__steps": 12},
    "greedy-proximal": {"stage1__schedule": "greedy", "stage1__steps": 12, "stage1__l1": "proximal"},
    "one-shot": {"stage1__schedule": "one-shot", "stage1__steps": 20},
}


def model_with_identities():
    model = tiny_model(num_layers=LAYERS)
    make_identity(find_decoder(model), *IDENTITIES)
    return model


@functools.cache
def text() -> torch.Tensor:
    """Written by the model itself, so that closing any layer but the two costs loss."""
    return sample(model_with_identities(), 64, 16)


def scored(config, num_drop=2, protected=()):
    made = bench(model_with_identities(), text(), config, protected=protected)
    with made.engine.mounted(made.decoder.model) as made.model:
        scores = score(made, num_drop)
    return scores, made


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_two_identities_are_doomed(schedule):
    scores, made = scored(job(stage1__lambda1=0.05, **SCHEDULES[schedule]))
    assert cut(scores.order, 2) == IDENTITIES
    assert len(scores.values) == LAYERS
    assert made.decoder.bypassed == frozenset(), "nothing stays bypassed"
    assert all(not layer._forward_hooks for layer in made.decoder.layers)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_protected_layers_stay(schedule):
    protected = (0, 1, 5)
    scores, _ = scored(job(stage1__lambda1=0.05, **SCHEDULES[schedule]), protected=protected)
    doomed = cut(scores.order, 2, protected)
    assert len(doomed) == 2
    if schedule.startswith("greedy"):
        assert set(scores.order[:2]) == set(doomed), "no round is spent on a protected layer"
    assert 4 in doomed
    assert not set(doomed) & set(protected)


@pytest.mark.parametrize("schedule", ["budget", "greedy"])
def test_the_same_seed_gives_the_same_gates_and_another_other_ones(schedule):
    config = job(stage1__lambda1=0.05, **SCHEDULES[schedule])
    (first, made), (again, made_again) = scored(config), scored(config)
    assert first == again
    gates = made.tracker.gates("stage1", LAYERS)
    assert torch.equal(gates, made_again.tracker.gates("stage1", LAYERS))
    other = scored(config.model_copy(update={"seed": 1}))[1].tracker.gates("stage1", LAYERS)
    assert not torch.equal(other, gates)


def test_the_weights_are_frozen():
    before = model_with_identities().state_dict()
    _, made = scored(job(stage1__schedule="budget", stage1__steps=5))
    after = made.decoder.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in made.decoder.model.parameters())


def test_the_budget_is_kept_at_each_step():
    _, made = scored(job(stage1__schedule="budget", stage1__steps=20, stage1__shrink_share=0.5))
    gates = made.tracker.gates("stage1", LAYERS)
    assert gates.min() >= 0
    assert gates.max() <= 1
    expected = [LAYERS - 2 * min(1, (step + 1) / 10) for step in range(20)]
    assert gates.sum(dim=1).tolist() == pytest.approx(expected, abs=1e-4)


def test_protected_gates_stay_at_one_under_a_budget():
    _, made = scored(job(stage1__schedule="budget", stage1__steps=10), protected=(0, 5))
    gates = made.tracker.gates("stage1", LAYERS)
    assert (gates[:, [0, 5]] == 1).all()


def test_greedy_dooms_one_layer_a_round_and_logs_it_as_zero_from_then_on():
    scores, made = scored(job(stage1__schedule="greedy", stage1__lambda1=0.05, stage1__steps=12))
    gates = made.tracker.gates("stage1", LAYERS)
    assert len(gates) == 24
    first = scores.order[0]
    assert (gates[:12] > 0).all()
    assert (gates[12:, first] == 0).all()
    assert (gates[12:, [i for i in range(LAYERS) if i != first]] != 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gate_moves_and_the_loss_follows_it(schedule):
    """What is logged as a step's loss is the loss of the model with the gates as logged the step before."""
    config = job(stage1__lambda1=0.05, train__batch_size=64, **SCHEDULES[schedule])
    _, made = scored(config, num_drop=1)
    gates, losses = made.tracker.gates("stage1", LAYERS), made.tracker.series("stage1/loss/lm")
    assert (gates[0] - gates[-1]).abs().max() > 0.1
    decoder = made.decoder
    from tsp.gates import Gates

    for step in (1, len(losses) - 1):
        replay = Gates(decoder)
        replay.values = gates[step - 1].clone()
        with replay.attached(), torch.no_grad():
            ids = text()
            loss = lm_loss(decoder.model(input_ids=ids, use_cache=False).logits, ids).item()
        assert losses[step] == pytest.approx(loss, rel=1e-4)
    assert losses[0] != losses[-1]


@pytest.mark.parametrize(
    ("schedule", "l1"), [("greedy", "subgradient"), ("greedy", "proximal"), ("one-shot", "subgradient")]
)
def test_lambda_zero_is_the_plain_loss(schedule, l1):
    _, made = scored(job(stage1__schedule=schedule, stage1__l1=l1, stage1__lambda1=0.0, stage1__steps=3))
    assert made.tracker.series("stage1/loss/total") == made.tracker.series("stage1/loss/lm")
    assert set(made.tracker.series("stage1/loss/penalty")) == {0.0}


def test_the_penalty_is_lambda_times_the_sum_of_the_open_gates():
    scores, made = scored(job(stage1__schedule="greedy", stage1__lambda1=0.05, stage1__steps=4))
    gates = torch.cat([torch.ones(1, LAYERS), made.tracker.gates("stage1", LAYERS)[:-1]])
    gates[4:, scores.order[0]] = 0  # bypassed in the second round
    lm, total, penalty = (made.tracker.series(f"stage1/loss/{name}") for name in ("lm", "total", "penalty"))
    assert len(penalty) == 8
    assert penalty == pytest.approx((0.05 * gates.abs().sum(dim=1)).tolist(), rel=1e-5)
    assert total == pytest.approx([a + b for a, b in zip(lm, penalty, strict=True)], rel=1e-5)


def test_the_proximal_step_reaches_exact_zeros():
    scores, made = scored(
        job(stage1__schedule="one-shot", stage1__l1="proximal", stage1__lambda1=1.0, stage1__steps=30)
    )
    gates = made.tracker.gates("stage1", LAYERS)
    assert (gates[-1, list(IDENTITIES)] == 0).all()
    assert cut(scores.order, 2) == IDENTITIES


@pytest.mark.parametrize("placement", ["residual", "output"])
def test_the_first_step_of_adam_is_the_learning_rate_in_the_gradients_direction(placement):
    config = job(stage1__placement=placement, stage1__schedule="one-shot", stage1__lambda1=10.0, stage1__steps=1)
    _, made = scored(config)
    # With so large a penalty every gradient is positive.
    assert made.tracker.gates("stage1", LAYERS)[0].tolist() == pytest.approx([1 - config.stage1.lr] * LAYERS, rel=1e-4)


def test_accumulation_changes_no_gate():
    # Of a model without identities: where a gradient is exactly 0, there is nothing to compare.
    gates = []
    for accumulation in (1, 4):
        config = job(stage1__schedule="budget", stage1__steps=6, train__accumulation=accumulation)
        made = bench(tiny_model(num_layers=LAYERS), tokens(32, 12), config)
        with made.engine.mounted(made.decoder.model) as made.model:
            score(made, 2)
        gates.append(made.tracker.gates("stage1", LAYERS))
    assert torch.allclose(*gates, atol=1e-4)


def test_every_step_is_counted_and_those_asked_for_are_logged():
    _, made = scored(job(stage1__schedule="one-shot", stage1__steps=7, tracking__log_every=3))
    assert [step for step, _ in made.tracker.rows] == [0, 3, 6]
    assert [step for step, _, _ in made.gate_history] == [0, 3, 6]
    assert made.global_step == 7
    assert made.trained_tokens == 7 * 8 * 16

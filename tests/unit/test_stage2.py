"""Stage 2 trains what it says, towards what it says, and leaves a plain frozen model."""

import math

import pytest
import torch

from tests.models import bench, job, make_identity, sample, tiny_model, tokens
from tests.transfers import DOOMED, LAYERS, changed, distillation, hooks, plain, transferred
from tsp.decoder import find_decoder
from tsp.errors import TspError
from tsp.methods.trsp import stage2
from tsp.methods.trsp.stage2 import gate_value, learning_rate, transfer


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_optimizer_outlives_its_training(stage):
    """That of the learning rate before it, and of the training after it."""
    import gc

    def held(word):
        kinds = (type(thing) for thing in gc.get_objects())
        ours = (kind.__name__ for kind in kinds if str(kind.__module__).startswith("deepspeed"))
        return sum(word in name for name in ours)

    gc.collect()
    engines, optimizers, during = held("DeepSpeedEngine"), held("Optimizer"), []
    made = bench(tiny_model(num_layers=LAYERS), tokens(32, 12), job(stage2__steps=1, stage2__trainable="full"), stage)
    made.after_step = lambda *_: during.append((held("DeepSpeedEngine"), held("Optimizer")))
    transfer(made, DOOMED, save_dtype=torch.float32)
    # With all weights trained the teacher is a model of its own, which ZeRO-3 shards without an optimizer.
    [(found, of_training)] = during
    assert found - engines == (2 if stage == 3 else 1)
    with made.engine.mounted(made.decoder.model):
        assert held("DeepSpeedEngine") - engines == (stage == 3)
        assert held("Optimizer") == optimizers < of_training or stage == 0
    assert stage == 3 or hooks(made.decoder.model) == []


@pytest.mark.parametrize("gates", ["hold", "anneal", "off"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_lr_zero_and_lambda_zero_leave_every_weight_bit_identical(trainable, gates):
    made = transferred(
        stage2__trainable=trainable, stage2__gates=gates, stage2__lr=0.0, stage2__lambda2=0.0, stage2__steps=4
    )
    assert changed(made) == set()
    assert plain(made)


@pytest.mark.parametrize("gates", ["hold", "anneal", "off"])
def test_trainable_none_leaves_every_weight_bit_identical(gates):
    made = transferred(
        stage2__trainable="none", stage2__gates=gates, stage2__lambda2=1.0, stage2__lr=0.1, stage2__steps=4
    )
    assert changed(made) == set()
    assert plain(made)


def test_trainable_none_trains_the_doomed_gates_and_no_others():
    made = transferred(
        stage2__trainable="none", stage2__gates="hold", stage2__lambda2=1.0, stage2__lr=0.05, stage2__steps=8
    )
    gates = made.tracker.gates("stage2", LAYERS)
    kept = [index for index in range(LAYERS) if index not in DOOMED]
    assert (gates[:, kept] == 1).all()
    assert (gates[-1, list(DOOMED)] < 0.8).all(), "the gap penalty closes them"


def test_no_steps_change_nothing():
    assert changed(transferred(stage2__steps=0)) == set()


@pytest.mark.parametrize("gates", ["hold", "anneal", "off"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_distillation_falls_and_the_pruned_model_comes_nearer_to_the_dense_one(trainable, gates):
    settings = {"stage2__trainable": trainable, "stage2__gates": gates, "stage2__steps": 25, "stage2__lr": 5e-3}
    before = distillation(transferred(stage2__steps=0))
    if gates == "hold":
        # The doomed layers go because of the penalty, and hidden states that stay as they are do not help it.
        settings |= {"stage2__lambda2": 0.3, "stage2__hidden": 0.0}
    made = transferred(**settings)
    after = distillation(made)
    assert after < 0.8 * before
    assert plain(made)
    if gates == "off":
        losses = made.tracker.series("stage2/loss/distill")
        assert losses[-1] < 0.8 * losses[0]
        # The last logged loss is of the model before its last step, on some of the blocks.
        assert after == pytest.approx(losses[-1], rel=0.3)


def test_lora_changes_the_linear_maps_and_full_everything():
    lora = changed(transferred(stage2__trainable="lora", stage2__gates="hold", stage2__lambda2=0.1))
    assert lora == {
        name
        for name in tiny_model(num_layers=LAYERS).state_dict()
        if name.startswith("model.layers.") and "proj" in name
    }
    full = changed(transferred(stage2__trainable="full", stage2__gates="hold", stage2__lambda2=0.1))
    assert full == set(tiny_model(num_layers=LAYERS).state_dict())


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_layers_closed_from_the_first_step_are_left_alone(trainable):
    made = transferred(stage2__trainable=trainable, stage2__gates="off")
    layers = {int(name.split(".")[2]) for name in changed(made) if name.startswith("model.layers.")}
    assert layers == set(range(LAYERS)) - set(DOOMED)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_gap_penalty_alone_makes_the_doomed_gap_smaller(trainable, norm):
    made = transferred(
        stage2__trainable=trainable,
        stage2__task={"lm": 0.0, "distill": 0.0},
        stage2__hidden=0.0,
        stage2__lambda2=1.0,
        stage2__lambda2_unit="one",
        stage2__gap_norm=norm,
        stage2__gates="hold",
        stage2__lr=1e-2,
        stage2__steps=20,
    )
    for index in DOOMED:
        gaps = made.tracker.series(f"stage2/gap/layer_{index:03d}")
        assert gaps[-1] < 0.7 * gaps[0]
    for index in set(range(LAYERS)) - set(DOOMED):
        assert set(made.tracker.series(f"stage2/gap/layer_{index:03d}")) == {0.0}
    sums = [sum(row[f"stage2/gap/layer_{index:03d}"] for index in DOOMED) for _, row in made.tracker.rows]
    assert made.tracker.series("stage2/loss/gap") == pytest.approx(sums, rel=1e-5)
    assert made.tracker.series("stage2/loss/total") == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lambda2_in_units_of_the_loss_does_not_feel_the_scale_of_the_gap(norm, accumulation):
    made = transferred(
        stage2__gates="hold", stage2__lambda2=0.5, stage2__gap_norm=norm, stage2__steps=3,
        train__batch_size=32, train__accumulation=accumulation,
    )  # fmt: skip
    lm, gap = (made.tracker.series(f"stage2/loss/{name}") for name in ("lm", "gap"))
    assert gap[0] == pytest.approx(0.5 * lm[0], rel=1e-5)
    sums = [sum(row[f"stage2/gap/layer_{index:03d}"] for index in DOOMED) for _, row in made.tracker.rows]
    units = [given / measured for given, measured in zip(gap, sums, strict=True)]
    assert units == pytest.approx([units[0]] * 3, rel=1e-5), "set once"


@pytest.mark.parametrize("reduction", ["token-mean", "token-sum", "frobenius"])
def test_the_penalty_does_not_depend_on_the_number_of_micro_batches(reduction):
    settings = {"gates": "hold", "lambda2": 0.5, "lambda2_unit": "one", "gap_norm": "l1", "gap_reduction": reduction}
    settings = {f"stage2__{key}": value for key, value in settings.items()} | {"stage2__steps": 2}
    once, split = (transferred(train__accumulation=parts, **settings).tracker for parts in (1, 4))
    for name in ("loss/gap", "gap/layer_001"):
        assert split.series(f"stage2/{name}") == pytest.approx(once.series(f"stage2/{name}"), rel=1e-3)


def test_a_closed_gate_leaves_nothing_to_be_weighed():
    made = transferred(stage2__gates="off", stage2__lambda2=0.5, stage2__steps=2)
    assert made.tracker.series("stage2/loss/gap") == [0, 0]


def test_the_gap_of_an_identity_is_zero_and_trains_nothing():
    model = tiny_model(num_layers=LAYERS)
    make_identity(find_decoder(model), *DOOMED)
    made = transferred(
        model, stage2__trainable="full", stage2__gates="hold", stage2__lambda2=1.0,
        stage2__task={"lm": 0.0, "distill": 0.0},
        stage2__lr=1e-2,
    )  # fmt: skip
    assert changed(made) == set()


def test_the_losses_add_up():
    made = transferred(
        stage2__task={"lm": 0.5, "distill": 2.0}, stage2__hidden=3.0, stage2__lambda2=0.1, stage2__gates="anneal",
        train__accumulation=2,
    )  # fmt: skip
    for _, row in made.tracker.rows:
        lm, distill, hidden, gap, total = (
            row[f"stage2/loss/{name}"] for name in ("lm", "distill", "hidden", "gap", "total")
        )
        assert total == pytest.approx(0.5 * lm + 2 * distill + 3 * hidden + gap, rel=1e-5)


def test_gates_are_logged_and_anneal_to_zero_before_the_end():
    made = transferred(stage2__gates="anneal", stage2__anneal_share=0.5, stage2__steps=10)
    gates = made.tracker.gates("stage2", LAYERS)
    assert gates[:, 1].tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0], abs=1e-6)
    assert torch.equal(gates[:, 1], gates[:, 2])
    assert (gates[:, [0, 3]] == 1).all()
    gaps = made.tracker.series("stage2/gap/layer_001")
    assert gaps[0] > 0
    assert gaps[5:] == [0.0] * 5


@pytest.mark.parametrize(("schedule", "value"), [("hold", 1), ("off", 0)])
def test_gates_hold_or_are_off(schedule, value):
    gates = transferred(stage2__gates=schedule).tracker.gates("stage2", LAYERS)
    assert (gates[:, list(DOOMED)] == value).all()
    assert (gates[:, [0, 3]] == 1).all()


def test_gate_and_learning_rate_schedules_by_hand():
    config = job(
        stage2__steps=100, stage2__lr=1.0, stage2__warmup_share=0.1, stage2__anneal_share=1.0, stage2__gates="anneal"
    ).stage2
    assert [gate_value(step, 100, config) for step in (0, 50, 99)] == pytest.approx([1, 0.5, 0.01])
    rates = [learning_rate(step, 100, config.lr, config.warmup_share) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.55, abs=1e-6)
    assert rates[99] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 89 / 90))
    assert rates[99] > 0.1
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_an_annealed_gate_never_is_left_open_at_the_drop():
    for steps in (1, 2, 3, 10):
        config = job(stage2__steps=steps, stage2__anneal_share=0.3, stage2__gates="anneal").stage2
        if steps > 1:
            assert gate_value(steps - 1, steps, config) == 0


def test_accumulation_changes_no_loss():
    losses = []
    for accumulation in (1, 4):
        made = transferred(
            stage2__gates="anneal", stage2__lambda2=0.1, stage2__steps=5, train__accumulation=accumulation
        )
        losses.append([row for name in ("distill", "gap") for row in made.tracker.series(f"stage2/loss/{name}")])
        losses[-1] += made.tracker.series("stage2/gap/layer_001")
    assert losses[0] == pytest.approx(losses[1], rel=2e-3, abs=1e-6)


def test_weights_end_in_values_that_the_checkpoint_can_hold():
    for trainable in ("lora", "full"):
        made = transferred(
            stage2__trainable=trainable, stage2__gates="hold", stage2__lambda2=0.1, save_dtype=torch.bfloat16
        )
        weights = made.decoder.model.state_dict()
        trained = changed(made)
        assert trained
        assert all(torch.equal(weights[name], weights[name].bfloat16().float()) for name in trained)


def test_lm_training_lowers_the_loss_of_the_pruned_model_on_its_text():
    blocks = sample(tiny_model(num_layers=LAYERS), 32, 12)
    made = transferred(
        blocks=blocks,
        stage2__task={"lm": 1.0, "distill": 0.0},
        stage2__trainable="full",
        stage2__steps=25,
        stage2__lr=5e-3,
    )
    losses = made.tracker.series("stage2/loss/lm")
    assert losses[-1] < 0.9 * losses[0]
    assert not made.tracker.series("stage2/loss/distill")


def test_the_same_seed_gives_the_same_weights():
    first, again = (transferred(stage2__gates="hold", stage2__lambda2=0.1, stage2__steps=4) for _ in range(2))
    weights = again.decoder.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.decoder.model.state_dict().items())


@pytest.mark.parametrize("trainable", ["lora", "full", "none"])
def test_a_failure_in_the_middle_leaves_no_layer_bypassed(trainable, monkeypatch):
    calls = []

    real = stage2.task_loss

    def fail_later(*args, **options):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return real(*args, **options)

    monkeypatch.setattr(stage2, "task_loss", fail_later)
    settings = job(stage2__trainable=trainable, stage2__gates="off", stage2__lr=1e-3)
    made = bench(tiny_model(num_layers=LAYERS), tokens(32, 12), settings)
    with pytest.raises(RuntimeError, match="out of memory"):
        transfer(made, DOOMED, save_dtype=torch.float32)
    assert made.decoder.bypassed == frozenset()
    assert not any(layer._forward_hooks for layer in made.decoder.layers)


@pytest.mark.parametrize("trainable", ["lora", "full", "none"])
def test_who_stops_it_between_two_steps_gets_a_plain_model_back(trainable):
    made = bench(
        tiny_model(num_layers=LAYERS),
        tokens(32, 12),
        job(stage2__trainable=trainable, stage2__gates="anneal", stage2__lr=0.05, stage2__steps=9),
    )
    steps = []

    def stop(stage, stats, gates):
        steps.append((stage, stats.step, [gates[index] for index in DOOMED]))
        if stats.step == 4:
            raise TspError("enough")

    made.after_step = stop
    with pytest.raises(TspError, match="enough"), made.engine.restored(made.decoder.model):
        transfer(made, DOOMED, save_dtype=torch.float32)
    assert [step for _, step, _ in steps] == [0, 1, 2, 3, 4]
    assert plain(made)
    assert changed(made) == set()

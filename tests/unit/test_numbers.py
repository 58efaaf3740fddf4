"""Numbers that are not finite: left out, counted, and the end when they go on; results that are no success."""

import copy
import math
import signal

import pytest
import torch

from tests.models import bench, engine, job, tiny_model, tokens
from tsp.data import Corpus
from tsp.decoder import find_decoder
from tsp.errors import ModelError, NumbersError
from tsp.evaluation.perplexity import perplexity
from tsp.gates import Gates
from tsp.interrupts import Pending, Terminated
from tsp.losses import lm_loss
from tsp.methods.trsp import stage1
from tsp.methods.trsp.stage2 import transfer
from tsp.numbers import collapses, first_not_finite, require_finite
from tsp.records import Scores
from tsp.sharding import AdamW
from tsp.training import PATIENCE, train

NAN = float("nan")


def trained(bad, *, accumulation=1, num_steps=3, stage=0):
    """Weights and stats after some steps, the loss of some forward passes (by number) being spoilt."""
    config = job(train__accumulation=accumulation)
    model, own, calls = tiny_model(), engine(config, stage), []
    model.requires_grad_(True)
    with own.mounted(model, AdamW()) as mounted:

        def loss(ids, share):
            spoilt = bad.get(len(calls), 0.0)
            calls.append(ids)
            return {"total": lm_loss(mounted(ids), ids, share) + spoilt}

        def before_step(step, num_steps):
            mounted.set_lr(0.01)

        stats = train(
            own, mounted, tokens(24, 12), config.train, num_steps=num_steps, seed=0, loss=loss, before_step=before_step
        )
        found = list(stats)
        weights = copy.deepcopy([parameter.detach() for parameter in model.parameters()]) if stage < 3 else []
    return weights, found, calls


def test_a_signal_behind_the_last_step_is_not_lost():
    config, model = job(), tiny_model().requires_grad_(True)
    own, pending, done = engine(config), Pending(), []
    with own.mounted(model, AdamW()) as mounted:
        steps = train(
            own,
            mounted,
            tokens(24, 12),
            config.train,
            num_steps=2,
            seed=0,
            loss=lambda ids, share: {"total": lm_loss(mounted(ids), ids, share)},
            pending=pending,
        )
        with pytest.raises(Terminated, match="SIGTERM"):
            for step in steps:
                done.append(step.step)
                if step.step == 1:
                    pending.number = signal.SIGTERM  # While the last step is logged, or its state written.
    assert done == [0, 1]


@pytest.mark.parametrize("spoilt", [NAN, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(spoilt):
    before, _, _ = trained({}, num_steps=1)
    after, stats, _ = trained({1: spoilt}, num_steps=2)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert (stats[1].left_out, stats[1].losses, stats[1].tokens) == (1, {}, 0)
    assert (stats[0].left_out, stats[0].tokens) == (0, 8 * 12)


def test_another_micro_batch_stands_in_for_one_that_is_not_finite():
    weights, [stats], calls = trained({1: NAN}, accumulation=2, num_steps=1)
    assert stats.left_out == 1
    assert torch.equal(calls[2], calls[0])
    # By hand: AdamW on the gradient of the usable half.
    model = tiny_model()
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    ids = calls[0]
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    optimizer.step()
    for expected, found in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)


def test_single_steps_are_forgiven_and_a_row_of_them_is_not():
    _, stats, _ = trained({0: NAN, 1: NAN, 3: NAN, 4: NAN}, num_steps=6)
    assert [one.left_out for one in stats] == [1, 1, 0, 1, 1, 0]
    with pytest.raises(NumbersError, match=f"not finite in {PATIENCE} steps in a row, the last is 3"):
        trained({1: NAN, 2: NAN, 3: NAN}, num_steps=6)


def broken(layer):
    model = tiny_model(num_layers=4)
    with torch.no_grad():
        {"embeddings": model.model.embed_tokens, "head": model.lm_head}.get(
            layer, model.model.layers[layer if isinstance(layer, int) else 0].mlp.down_proj
        ).weight.fill_(NAN)
    return model


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (2, "layer 2 is the first"),
        (0, "layer 0 is the first"),
        ("embeddings", "the embeddings"),
        ("head", "it is the head or the loss"),
    ],
)
def test_the_first_place_is_named(layer, words):
    made = bench(broken(layer), tokens(8, 16), job())
    with made.engine.mounted(made.decoder.model) as model:
        assert words in first_not_finite(made.engine, made.decoder, model, made.blocks_NT)
        with pytest.raises(ModelError, match=words):
            require_finite(made.engine, made.decoder, model, {"text": measured(NAN)}, [text(made.blocks_NT)])
        require_finite(made.engine, made.decoder, model, {"text": measured(2.0)}, [text(made.blocks_NT)])


def test_the_place_is_looked_for_where_the_numbers_are_not_finite():
    """A row of the embeddings that only the second corpus has, in its third window."""
    model = tiny_model(num_layers=4)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = NAN
    good = tokens(4, 16).clamp(min=8)
    bad = good.clone()
    bad[2, 5] = 7
    made = bench(model, good, job())
    corpora = [text(good), text(bad, "other")]
    with made.engine.mounted(made.decoder.model) as mounted:
        found = {"text": measured(2.0, 2.0, 2.0, 2.0), "other": measured(2.0, 2.0, NAN, 2.0)}
        with pytest.raises(ModelError, match="perplexity on other is nan: the embeddings are not finite"):
            require_finite(made.engine, made.decoder, mounted, found, corpora)


def measured(*losses):
    return perplexity(torch.tensor(losses), 16)


def text(blocks, name="text"):
    return Corpus(name, name, blocks)


@pytest.mark.parametrize("schedule", ["budget", "greedy"])
def test_learned_gates_stop_at_a_broken_layer(schedule):
    made = bench(broken(1), tokens(16, 16), job(stage1__schedule=schedule, stage1__steps=5))
    with (
        made.engine.mounted(made.decoder.model) as made.model,
        pytest.raises(NumbersError, match="layer 1 is the first"),
    ):
        stage1.score(made, 2)
    assert made.left_out == PATIENCE - 1, "the last one is in the error"


@pytest.mark.parametrize("stage", [0, 3])
def test_stage_2_stops_at_a_broken_layer(stage):
    made = bench(broken(3), tokens(16, 16), job(stage2__lr=0.01, stage2__steps=5), stage)
    with pytest.raises(NumbersError, match="layer 3 is the first"):
        transfer(made, (1,), save_dtype=torch.float32)


def scores(values, method="gates-budget"):
    return Scores(method=method, values=tuple(values), order=tuple(range(len(values))))


@pytest.mark.parametrize(
    ("found", "pruned", "words"),
    [
        (scores([1.0, 0.0, 0.5]), 12.0, None),
        (scores([1.0, 0.0, 0.5]), 100.0, None),
        (scores([1.0, 0.0, 0.5]), 101.0, "from 10 to 101, more than 10 times"),
        (scores([1.0, 0.0, 0.5]), math.inf, "to inf"),
        (scores([1.0, 0.0, 0.5]), NAN, "to nan"),
        (scores([1e-4, -2e-4, 0.0]), 12.0, "all gates collapsed, the largest is 0.0002"),
        (scores([0.7, 0.7001, 0.7]), 12.0, "choose no layer"),
        (scores([0.7, 0.7001, 0.7], "gates-search"), 12.0, None),
        (scores([3.0, 3.0, 3.0], "shortgpt"), 12.0, None),
    ],
)
def test_what_is_no_success(found, pruned, words):
    said = collapses(found, (), {"text": {"dense": 10.0, "bare_drop": 1e9, "pruned": pruned}})
    assert [words in one for one in said] == ([True] if words else [])


def test_gates_are_used_as_they_are_where_nothing_is_wrong():
    decoder = find_decoder(tiny_model())
    assert collapses(scores(Gates(decoder).values.tolist()), (), {}), "gates that nobody has moved choose nothing"

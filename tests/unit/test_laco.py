"""Merging against weights added up by hand and a model built without the layers; the search against its algorithm."""

import pytest
import torch
import torch.nn.functional as F

from tests.models import bench, job, logits, tiny_model, tokens, without_layers
from tsp.errors import ConfigError, ModelError
from tsp.methods import refuse_nonsense
from tsp.methods.laco import laco, merge, merged

LAYERS = 8
TEXT = tokens(6, 16)


# Where a family has its layers, and the norm behind them.
PATHS = {"llama": ("model.layers", "model.norm"), "gpt2": ("transformer.h", "transformer.ln_f")}


def by_hand(doomed, family="llama", **kind):
    """A model of the family's own class without the doomed layers, their weights added to the layer before."""
    dense, (stack, _) = tiny_model(family, LAYERS, **kind), PATHS[family]
    weights = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for name in weights:
        parts = name.split(".")
        if not name.startswith(f"{stack}.") or int(parts[2]) in doomed:
            continue
        base, following = int(parts[2]), int(parts[2]) + 1
        original = dense.state_dict()[name]
        while following in doomed:
            other = dense.state_dict()[".".join([*parts[:2], str(following), *parts[3:]])]
            weights[name] = weights[name] + (other - original)
            following += 1
        assert base not in doomed
    dense.load_state_dict(weights)
    return without_layers(dense, tuple(doomed), stack)


@pytest.mark.parametrize("family", PATHS)
@pytest.mark.parametrize("doomed", [(3,), (1, 2, 3), (2, 4, 5), (7,), tuple(range(1, LAYERS))])
def test_merge_is_the_sum_of_differences_to_the_original_weights(doomed, family):
    made = bench(tiny_model(family, LAYERS, std=0.1), TEXT, job())
    merge(made, doomed, save_dtype=torch.float32)
    with made.decoder.bypassing(doomed):
        found = logits(made.decoder.model, TEXT)
    assert torch.allclose(found, logits(by_hand(doomed, family, std=0.1), TEXT), atol=1e-5)
    assert made.trained_tokens == 0


def test_merge_of_nothing_changes_nothing():
    made, dense = bench(tiny_model(num_layers=LAYERS), TEXT, job()), tiny_model(num_layers=LAYERS).state_dict()
    merge(made, (), save_dtype=torch.float32)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in made.decoder.model.state_dict().items())


def test_merged_weights_can_be_represented_where_they_are_saved():
    made = bench(tiny_model(num_layers=LAYERS), TEXT, job())
    merge(made, (4,), save_dtype=torch.bfloat16)
    for weight in made.decoder.layers[3].parameters():
        assert torch.equal(weight, weight.to(torch.bfloat16).to(torch.float32))


@pytest.mark.parametrize("stage", [0, 3])
def test_after_a_trial_the_weights_are_what_they_were_bit_for_bit(stage):
    made = bench(tiny_model(num_layers=LAYERS, std=0.1), TEXT, job(), stage)
    with made.engine.mounted(made.decoder.model) as model:
        dense = model(TEXT).detach().clone()
        with merged(made, (2, 3, 6)):
            trial = model(TEXT).detach().clone()
        assert torch.equal(model(TEXT), dense)
        with pytest.raises(RuntimeError), merged(made, (2,)):
            raise RuntimeError
        assert torch.equal(model(TEXT), dense)
    assert torch.allclose(trial, logits(by_hand((2, 3, 6), std=0.1), TEXT), atol=1e-5)
    assert made.decoder.bypassed == frozenset()


@pytest.mark.parametrize(
    ("family", "doomed", "reason"),
    [
        ("llama", (0, 1, 4), r"merge folds dropped layers .* layers 0,1 have none; protect the first layer"),
        ("qwen2_moe", (2,), "merge cannot add layer 2 to layer 1: their weights differ in name or shape"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_left_alone(family, doomed, reason):
    made, dense = bench(tiny_model(family), TEXT, job()), tiny_model(family).state_dict()
    with pytest.raises(ModelError, match=reason):
        merge(made, doomed, save_dtype=torch.float32)
    assert all(torch.equal(tensor, dense[name]) for name, tensor in made.decoder.model.state_dict().items())


def cosine_by_hand(doomed, family="llama"):
    def last(model):
        states, norm = [], model.get_submodule(PATHS[family][1])
        hook = norm.register_forward_pre_hook(lambda norm, args: states.append(args[0]))
        logits(model, TEXT)
        hook.remove()
        return states[0]

    dense = last(tiny_model(family, LAYERS, std=0.1))
    return F.cosine_similarity(last(by_hand(doomed, family, std=0.1)), dense, dim=-1).mean().item()


def algorithm_1(num_drop, family="llama", *, c, interval, threshold, step):
    """The paper's search on a list of layers, with the threshold lowered and the last merge cut short."""
    doomed = []
    while len(doomed) < num_drop:
        left = [index for index in range(LAYERS) if index not in doomed]
        at = max(len(left) - c, 0)
        while at >= 0 and len(doomed) < num_drop:
            run = left[at + 1 :][: min(c - 1, num_drop - len(doomed))]
            if run and cosine_by_hand({*doomed, *run}, family) > threshold:
                doomed += sorted(run, reverse=True)
                left = [index for index in left if index not in run]
                at = min(at - interval, max(len(left) - c, 0))
            else:
                at -= 1
        threshold -= step
    return tuple(doomed)


def scored(num_drop, protected=(), stage=0, family="llama", blocks=TEXT, **settings):
    made = bench(tiny_model(family, LAYERS, std=0.1), blocks, job(**settings), stage, protected)
    with made.engine.mounted(made.decoder.model) as made.model:
        return laco(made, num_drop)


@pytest.mark.parametrize(
    ("num_drop", "c", "interval", "threshold", "step"),
    [(1, 2, 1, 0.9, 0.1), (3, 3, 2, 0.95, 0.05), (4, 3, 1, 0.9, 0.02), (5, 4, 2, 0.65, 0.05), (7, 4, 2, 0.9, 0.3)],
)
@pytest.mark.parametrize("family", PATHS)
def test_the_search_is_the_papers(num_drop, c, interval, threshold, step, family):
    settings = {"max_layers": c, "interval": interval, "threshold": threshold, "step": step}
    scores = scored(num_drop, family=family, laco=settings)
    assert scores.order == algorithm_1(num_drop, family, c=c, interval=interval, threshold=threshold, step=step)
    assert len(scores.order) == num_drop
    kept = set(range(LAYERS)) - set(scores.order)
    assert {scores.values[index] for index in kept} == {max(scores.values)}
    assert scores.values[scores.order[-1]] == pytest.approx(1 - cosine_by_hand(set(scores.order), family), abs=1e-5)


def test_a_threshold_that_nothing_meets_and_one_that_all_meet_choose_otherwise():
    strict, easy = (scored(3, laco={"threshold": threshold, "step": 0.01}).order for threshold in (0.99, -1.0))
    assert easy == (7, 6, 5), "the first that is tried: the topmost"
    assert cosine_by_hand(set(strict)) > cosine_by_hand(set(easy))


def test_as_many_sequences_are_compared_as_asked_for():
    one = scored(3, blocks=TEXT[:1])
    assert scored(3, blocks=TEXT[:1].repeat(4, 1), laco={"blocks": 1}) == one
    assert scored(3, blocks=TEXT).values != one.values
    assert scored(3, blocks=TEXT, prune__score_blocks=1) == scored(3, blocks=TEXT)


def test_a_merge_that_gives_no_number_is_as_unlike_as_can_be():
    """Norms that add up to infinity, times weights of zero; the dense model is sound."""
    model = tiny_model(num_layers=4, std=0.1)
    for index, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.weight.data.fill_(5e37 if index else -5e37)
        for weight in layer.mlp.parameters():
            weight.data.zero_()
    assert logits(model, TEXT).isfinite().all()
    made = bench(model, TEXT, job(laco={"max_layers": 4}))
    with made.engine.mounted(model) as made.model:
        scores = laco(made, 3)
    assert scores.order == (3, 2, 1)
    assert scores.values == (2.0,) * 4, "1 - cosine, the cosine at its worst"


def test_the_search_is_the_same_under_zero_3():
    assert scored(3, stage=3) == scored(3)


def test_protected_layers_stay_and_leave_no_room():
    assert not {0, 6, 7}.intersection(scored(4, protected=(0, 6, 7)).order)
    with pytest.raises(ConfigError, match=r"prune.method laco can merge 1 layers into the one before, 2 are to go"):
        scored(2, protected=(1, 2, 4, 5, 6, 7))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prune__method": "laco", "transfer": "stage2"}, "chooses layers to merge .* give transfer=merge"),
        ({"transfer": "finetune", "stage2__trainable": "none"}, "transfer finetune trains nothing"),
        ({"transfer": "distill", "stage2__trainable": "none"}, "transfer distill trains nothing"),
    ],
)
def test_what_makes_no_sense_together_is_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        refuse_nonsense(job(**settings))
    refuse_nonsense(job(**settings | {"transfer": "none"}))

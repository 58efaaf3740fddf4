"""The fold against numpy's least squares, on models built without the layers, and what cannot be folded."""

import numpy as np
import pytest
import torch

from tests.families import family_model
from tests.models import bench, job, logits, tiny_model, tokens, without_layers
from tsp.decoder import find_decoder
from tsp.errors import ModelError
from tsp.methods.replaceme import check, correction, replaceme
from tsp.selection import runs

LAYERS = 6


def folded(model, doomed, blocks, **settings):
    made = bench(model, blocks, job(replaceme__ridge=0.0, **settings))
    replaceme(made, doomed, save_dtype=torch.float32)
    return made


def inside(model, blocks, path):
    """What the module at this path returns, `[N, D]`, by a hook of our own."""
    outputs = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, out: outputs.append(out))
    logits(model, blocks)
    hook.remove()
    found = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return found.reshape(-1, found.shape[-1]).double().numpy()


def test_runs():
    assert runs({4, 3, 7, 9, 8, 1}) == [range(1, 2), range(3, 5), range(7, 10)]
    assert runs(()) == []


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("doomed", [(3, 4), (2,), (1, 4, 5)])
def test_the_folded_weight_is_the_least_squares_solution(doomed, ridge):
    model, blocks = tiny_model(num_layers=LAYERS), tokens(24, 16)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = {}
    for run in runs(doomed):
        kept = run.start - 1
        m = inside(model, blocks, f"model.layers.{kept}.mlp.down_proj")
        x, y = inside(model, blocks, f"model.layers.{kept}"), inside(model, blocks, f"model.layers.{run.stop - 1}")
        # Ridge regression as ordinary least squares on more rows.
        pull = np.sqrt(ridge * np.mean(np.sum(m * m, axis=0)))
        rows = np.concatenate([m, pull * np.eye(m.shape[1])])
        targets = np.concatenate([y - x, np.zeros((m.shape[1], m.shape[1]))])
        correction, *_ = np.linalg.lstsq(rows, targets, rcond=None)
        weight = dense[f"model.layers.{kept}.mlp.down_proj.weight"].double().numpy()
        expected[f"model.layers.{kept}.mlp.down_proj.weight"] = (np.eye(len(correction)) + correction).T @ weight
    made = bench(model, blocks, job(replaceme__ridge=ridge))
    replaceme(made, doomed, save_dtype=torch.float32)
    for name, tensor in made.decoder.model.state_dict().items():
        wanted = torch.tensor(expected[name], dtype=torch.float32) if name in expected else dense[name]
        assert torch.allclose(tensor, wanted, rtol=1e-3, atol=1e-4), name
        assert name in expected or torch.equal(tensor, dense[name])
    assert made.trained_tokens == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "qwen2", "gpt_neo"])
def test_what_the_kept_layer_hands_on_comes_nearer_to_the_dense_model(family):
    model, blocks = tiny_model(family, LAYERS), tokens(24, 16)
    stack = find_decoder(model).path
    before = without_layers(model, (2, 3), stack)
    target = torch.tensor(inside(model, blocks, f"{stack}.3"))
    made = folded(model, (2, 3), blocks)
    after = without_layers(made.decoder.model, (2, 3), stack)
    errors = [
        (torch.tensor(inside(smaller, blocks, f"{stack}.1")) - target).pow(2).sum() for smaller in (before, after)
    ]
    assert errors[1] < errors[0]


def test_layers_that_do_nothing_leave_the_weights_alone():
    from tests.models import make_identity

    model, blocks = tiny_model(num_layers=LAYERS), tokens(24, 16)
    make_identity(find_decoder(model), 2, 3)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = folded(model, (2, 3), blocks)
    for name, tensor in made.decoder.model.state_dict().items():
        assert torch.allclose(tensor, dense[name], atol=1e-6), name


def test_too_little_text_without_a_ridge_is_said():
    with pytest.raises(ModelError, match="too little calibration text"):
        correction(torch.zeros(4, 8, dtype=torch.float64), 0.0)


def test_the_weights_can_be_represented_where_they_are_saved():
    made = bench(tiny_model(num_layers=LAYERS), tokens(24, 16), job())
    replaceme(made, (3,), save_dtype=torch.bfloat16)
    weight = made.decoder.layers[2].mlp.down_proj.weight
    assert torch.equal(weight, weight.to(torch.bfloat16).to(torch.float32))


@pytest.mark.parametrize(
    ("family", "doomed", "reason"),
    [
        ("gemma2", None, "replaceme can fold nothing into any layer of this model: it adds no linear map's output"),
        ("gptj", None, "2 linear maps side by side"),
        ("gemma2", (2,), "replaceme cannot fold layers 2 into layer 1"),
        ("llama", (0, 1), "layers 0,1 have none"),
        ("llama", (2, 3), None),
        ("gpt2", None, None),
    ],
)
def test_a_model_that_cannot_be_folded_is_refused_before_anything_is_measured(family, doomed, reason):
    made = bench(family_model(family), tokens(8, 8), job())
    with made.engine.mounted(made.decoder.model) as made.model:
        if reason is None:
            check(made, doomed)
            return
        with pytest.raises(ModelError, match=reason):
            check(made, doomed)


@pytest.mark.parametrize(
    ("family", "doomed", "reason"),
    [
        ("llama", (0, 1), r"layers 0,1 have none; protect the first layer"),
        ("gemma2", (2,), r"cannot fold layers 2 into layer 1: it adds no linear map's output as it is"),
        ("olmo2", (2,), "no linear map's output as it is"),
        ("mixtral", (2,), "mixture of experts"),
        ("granite", (2,), "a norm or a scale follows"),
        ("gptj", (2,), "2 linear maps side by side"),
        ("phi", (2,), "parallel block"),
    ],
)
def test_what_cannot_be_folded_is_refused_and_left_alone(family, doomed, reason):
    model = (
        tiny_model(num_layers=LAYERS)
        if family == "llama"
        else family_model(family, **({"residual_multiplier": 0.5} if family == "granite" else {}))
    )
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=reason):
        folded(model, doomed, tokens(8, 8))
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())

"""What a pass holds and computes, found without data, is what it holds and computes with data."""

import json

import pytest
import torch

from tests.models import model_folder, tiny_config, tiny_model
from tsp import footprint
from tsp.config import ModelConfig
from tsp.decoder import find_decoder
from tsp.errors import ModelError
from tsp.footprint import Pass, shape_of
from tsp.live import LiveBytes, cheap_collections, operations
from tsp.settings import Stage2Config

B, T = 4, 16
OUTPUTS = Stage2Config(trainable="full", hidden=0.0)
HIDDEN = Stage2Config(trainable="full", hidden=3.0)
PASSES = {
    "evaluation": Pass(batch=B, block_tokens=T),
    "stage 1": Pass(batch=B, block_tokens=T, learns="gates"),
    "adapters": Pass(batch=B, block_tokens=T, learns="transfer", num_doomed=2),
    "all weights": Pass(batch=B, block_tokens=T, learns="transfer", stage2=OUTPUTS, num_doomed=2),
    "hidden states": Pass(batch=B, block_tokens=T, learns="transfer", stage2=HIDDEN, num_doomed=2),
    "checkpointing": Pass(batch=B, block_tokens=T, learns="transfer", stage2=HIDDEN, num_doomed=2, checkpointing=True),
    "gates held": Pass(batch=B, block_tokens=T, learns="transfer", stage2=Stage2Config(gates="hold"), num_doomed=2),
}


@pytest.fixture
def shape(tmp_path):
    def make(family="llama", num_layers=6):
        folder = tmp_path / f"{family}-{num_layers}"
        tiny_config(family, num_layers).save_pretrained(folder)
        return shape_of(ModelConfig(path=str(folder)))

    return make


def test_bytes_are_counted_while_somebody_holds_them():
    with LiveBytes() as live:
        first = torch.ones(1000)
        view = first[:10]
        second = first + 1
        assert live.now == 8000
        del first
        assert live.now == 8000, "the view holds it"
        del view
        assert live.now == 4000
        second.add_(1)
        assert live.now == 4000
        del second
    assert (live.now, live.peak) == (0, 8000)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("one", PASSES.values(), ids=PASSES)
def test_shapes_cost_what_data_cost(one, family, shape):
    model = tiny_model(family, 6).eval()
    live, flops = LiveBytes(collect=one.checkpointing), operations()
    if one.checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    act = {"nothing": footprint._measured, "gates": footprint._stage1, "transfer": footprint._stage2}[one.learns]
    with cheap_collections():
        act(find_decoder(model), torch.zeros(B, T, dtype=torch.long), one, live, flops)
    found = shape(family).cost(one, torch.float32)
    assert found.flops == flops.get_total_flops()
    assert found.peak_bytes == pytest.approx(live.peak, rel=0.02)


def test_operations_are_those_of_the_formula(shape):
    """Two for each weight and token; four for gates, whose backward pass needs no gradients of the weights."""
    config, tokens = tiny_config("llama", 6), B * T
    multiplied = shape().num_parameters - config.vocab_size * config.hidden_size
    attention = 4 * config.num_hidden_layers * B * T * T * config.hidden_size
    forward = shape().cost(PASSES["evaluation"], torch.float32).flops
    assert forward == pytest.approx(2 * multiplied * tokens + attention, rel=0.02)
    assert shape().cost(PASSES["stage 1"], torch.float32).flops == pytest.approx(2 * forward, rel=0.15)


@pytest.mark.parametrize("one", PASSES.values(), ids=PASSES)
def test_a_long_stack_is_extrapolated_from_short_ones(one, shape):
    long = shape(num_layers=20)
    cost, whole = long.cost(one, torch.float32), long._run(one, torch.float32)
    assert cost.flops == pytest.approx(whole.flops, rel=1e-6)
    assert cost.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.02)


def test_a_shape_is_that_of_the_model(tmp_path):
    model = tiny_model("qwen2", 5, tie_word_embeddings=True)
    folder = model_folder(tmp_path / "whole", model)
    shape = shape_of(ModelConfig(path=str(folder)))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_layers == 5
    assert sum(shape.layer_parameters) == sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert shape.largest_module == model.config.vocab_size * model.config.hidden_size


def test_only_the_config_has_to_be_there(tmp_path):
    with pytest.raises(ModelError, match="has no config"):
        shape_of(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="encoder-decoder"):
        shape_of(ModelConfig(path=str(tmp_path)))

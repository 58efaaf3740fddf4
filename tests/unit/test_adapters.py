"""Adapters: in, off, merged, out; without a trace but in the weights."""

from contextlib import nullcontext

import pytest
import torch

from tests.models import logits, tiny_model, tokens
from tsp.adapters import _adapted, adapters_off, add_adapters, merge_adapters
from tsp.decoder import find_decoder
from tsp.errors import ModelError
from tsp.settings import LoraConfig

FAMILIES = ["llama", "opt", "gpt2", "bloom"]


def whole(parameters, *, modify=False):
    return nullcontext()


def adapted(family, layers=(0, 1, 3), dtype=torch.float32, rank=4):
    model = tiny_model(family, 4)
    decoder = find_decoder(model)
    add_adapters(decoder, layers, LoraConfig(rank=rank, alpha=8.0), dtype)
    return decoder


def disturb(model):
    """Give every adapter something to say."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing_and_they_alone_train(family):
    decoder = adapted(family)
    assert torch.equal(logits(decoder.model, tokens()), logits(tiny_model(family, 4), tokens()))
    trainable = {name for name, parameter in decoder.model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    layers = {int(name[len(decoder.path) + 1 :].split(".")[0]) for name in trainable}
    assert layers == {0, 1, 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_off_is_the_dense_model_bit_for_bit(family):
    decoder = adapted(family)
    disturb(decoder.model)
    dense = logits(tiny_model(family, 4), tokens())
    changed = logits(decoder.model, tokens())
    assert not torch.allclose(changed, dense, atol=1e-2)
    with adapters_off(decoder.model):
        assert torch.equal(logits(decoder.model, tokens()), dense)
    assert torch.equal(logits(decoder.model, tokens()), changed), "and on again"


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_give_the_same_logits(family):
    decoder = adapted(family)
    disturb(decoder.model)
    expected = logits(decoder.model, tokens())
    merge_adapters(decoder.model, whole)
    assert torch.allclose(logits(decoder.model, tokens()), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_peft_is_left(family):
    model, decoder = tiny_model(family, 4), adapted(family)
    disturb(decoder.model)
    changed = merge_adapters(decoder.model, whole)
    after = decoder.model
    assert [(name, type(module)) for name, module in after.named_modules()] == [
        (name, type(module)) for name, module in model.named_modules()
    ]
    assert list(after.state_dict()) == list(model.state_dict())
    assert not _adapted(after)
    assert [set(vars(module)) for module in after.modules()] == [set(vars(module)) for module in model.modules()]
    # All and only the linear maps of the chosen layers changed.
    different = {
        n
        for (n, new), old in zip(after.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    reported = {n for n, parameter in after.named_parameters() if any(parameter is weight for weight in changed)}
    assert different == reported
    assert {int(name[len(decoder.path) + 1 :].split(".")[0]) for name in different} == {0, 1, 3}


def test_adapters_can_be_put_in_again():
    decoder = adapted("llama")
    disturb(decoder.model)
    merge_adapters(decoder.model, whole)
    once = logits(decoder.model, tokens())
    add_adapters(decoder, [2], LoraConfig(rank=2, alpha=2.0), torch.float32)
    assert torch.equal(logits(decoder.model, tokens()), once)
    assert len(_adapted(decoder.model)) == 7


def test_merging_adds_scale_times_b_times_a():
    decoder = adapted("llama")
    disturb(decoder.model)
    layer = decoder.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    before = layer.base_layer.weight.detach().clone()
    merge_adapters(decoder.model, whole)
    assert torch.allclose(decoder.layers[1].mlp.up_proj.weight, before + 8.0 / 4 * b @ a, atol=1e-6)


def test_adapters_have_the_dtype_that_is_asked_for():
    decoder = find_decoder(tiny_model().bfloat16())
    add_adapters(decoder, [0], LoraConfig(rank=2, alpha=2.0), torch.bfloat16)
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {torch.bfloat16}


def test_layers_of_equal_names_in_another_place_are_left_alone():
    """Layer 1 and layer 11 differ by a digit."""
    decoder = find_decoder(tiny_model(num_layers=12))
    add_adapters(decoder, [1], LoraConfig(rank=2, alpha=2.0), torch.float32)
    assert {name.split(".")[2] for name in _adapted(decoder.model)} == {"1"}


def test_layers_without_linear_maps_are_refused():
    decoder = find_decoder(tiny_model())
    decoder.layers[0].self_attn, decoder.layers[0].mlp = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(ModelError, match="no linear maps"):
        add_adapters(decoder, [0], LoraConfig(), torch.float32)

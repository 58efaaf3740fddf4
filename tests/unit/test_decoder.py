"""The layer stack of any decoder-only model: found by structure, probed, bypassed; or refused with the reason."""

import pytest
import torch
from torch import nn

from tests.models import logits, tiny_config, tiny_model, tokens, without_layers
from tsp.decoder import find_decoder, hidden_in, hidden_out, with_hidden
from tsp.errors import ModelError

STACKS = {
    "llama": ("model.layers", None),
    "mistral": ("model.layers", None),
    "qwen2": ("model.layers", None),
    "gemma2": ("model.layers", None),
    "opt": ("model.decoder.layers", None),
    "gpt2": ("transformer.h", None),
    "gpt_neo": ("transformer.h", 2),
    "bloom": ("transformer.h", 2),
}


@pytest.mark.parametrize("family", STACKS)
def test_stack_is_found_and_a_bypassed_layer_is_a_layer_that_is_not_there(family):
    model = tiny_model(family)
    decoder = find_decoder(model)
    assert (decoder.path, decoder.num_outputs) == STACKS[family]
    assert decoder.num_layers == 5
    ids, dense = tokens(), logits(model, tokens())
    with decoder.bypassing([1, 3]):
        assert decoder.bypassed == {1, 3}
        bypassed = logits(model, ids)
    assert not torch.allclose(bypassed, dense, atol=1e-2), "the layers matter"
    assert torch.equal(bypassed, logits(without_layers(model, (1, 3), decoder.path), ids))
    assert torch.equal(logits(model, ids), dense), "no trace afterwards"
    assert decoder.bypassed == frozenset()


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_first_last_and_all_layers_can_be_bypassed(family):
    model = tiny_model(family)
    decoder = find_decoder(model)
    for dropped in [(0,), (4,), (0, 1, 2, 3)]:
        with decoder.bypassing(dropped):
            assert torch.equal(logits(model, tokens()), logits(without_layers(model, dropped, decoder.path), tokens()))


def test_bypassing_can_be_nested_and_ends_also_by_an_error():
    decoder = find_decoder(tiny_model())
    with pytest.raises(RuntimeError), decoder.bypassing([0]):
        with decoder.bypassing([1, 2]):
            assert decoder.bypassed == {1, 2}
        assert decoder.bypassed == {0}
        raise RuntimeError
    assert decoder.bypassed == frozenset()


def test_a_bypassed_layer_computes_nothing():
    decoder = find_decoder(tiny_model())
    calls = []
    decoder.layers[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    with decoder.bypassing([2]):
        logits(decoder.model, tokens())
    assert not calls


def test_a_bypassed_layer_returns_as_many_things_as_a_real_one():
    decoder, hidden = find_decoder(tiny_model("gpt_neo")), torch.ones(1, 3, 32)
    with decoder.bypassing([1]):
        returned = decoder.layers[1](hidden, use_cache=False)
        assert returned[0] is hidden
        assert returned[1:] == (None,)
        assert decoder.layers[1](hidden_states=hidden)[0] is hidden
    assert len(decoder.layers[1](hidden)) == 2


def test_probing_leaves_mode_and_hooks_as_they_were():
    model = tiny_model().train()
    before = model.state_dict()
    find_decoder(model)
    assert model.training
    assert all(not layer._forward_hooks for layer in model.model.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_stack_is_refused():
    model = tiny_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="exactly one list of 7 layers, found: none"):
        find_decoder(model)


def test_of_two_stacks_the_one_that_text_runs_through_is_taken_and_two_such_are_refused_by_name():
    model = tiny_model()
    model.model.more = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
    assert find_decoder(model).path == "model.layers", "an encoder of images, say, as deep as the text's stack"
    for inner, outer in zip(model.model.more, model.model.layers, strict=True):
        outer.register_forward_pre_hook(lambda layer, args, inner=inner: (inner(args[0]), *args[1:]))
    with pytest.raises(ModelError, match=r"found: model\.layers, model\.more"):
        find_decoder(model)


class Toy(nn.Module):
    """A made-up model: runs the layers in the given order and hands on what `step` makes of each."""

    def __init__(self, order, step=lambda layer, hidden: layer(hidden)):
        super().__init__()
        self.config = tiny_config("llama", 3)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.order, self.step = order, step

    def forward(self, input_ids, use_cache):
        hidden = torch.ones(*input_ids.shape, 4)
        for index in self.order:
            hidden = self.step(self.layers[index], hidden)
        return hidden


class Cutter(nn.Module):
    def forward(self, hidden):
        return hidden[:, :1]


class Mapper(nn.Module):
    def forward(self, hidden):
        return {"hidden": hidden}


def test_a_toy_is_found():
    assert find_decoder(Toy([0, 1, 2])).path == "layers"


@pytest.mark.parametrize("order", [[0, 1, 1, 2], [0, 2], [1, 0, 2], []])
def test_layers_called_twice_or_never_or_in_another_order_are_refused(order):
    with pytest.raises(
        ModelError, match=r"each be called once, in order; got the calls \[" + ", ".join(map(str, order))
    ):
        find_decoder(Toy(order))


@pytest.mark.parametrize("odd", [Cutter(), Mapper()])
def test_a_layer_that_does_not_return_a_hidden_state_is_refused(odd):
    toy = Toy([0, 1, 2], step=lambda layer, hidden: hidden if layer(hidden) is None else hidden)
    toy.layers[1] = odd
    with pytest.raises(ModelError, match="same shape"):
        find_decoder(toy)


def test_a_layer_without_a_hidden_state_at_its_place_is_refused():
    class Keyword(nn.Module):
        def forward(self, *, x):
            return x

    toy = Toy([0, 1, 2], step=lambda layer, hidden: layer(x=hidden))
    toy.layers = nn.ModuleList(Keyword() for _ in range(3))
    toy.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelError, match="take the hidden state first"):
        find_decoder(toy)


def test_hidden_state_is_found_wherever_a_family_puts_it():
    x, y = torch.ones(1), torch.zeros(1)
    assert hidden_in((x, y), {}) is x
    assert hidden_in((), {"hidden_states": x}) is x
    assert hidden_out(x) is x
    assert hidden_out((x, y)) is x
    assert with_hidden(x, y) is y
    assert with_hidden((x, 3, None), y) == (y, 3, None)

"""Names and config after a drop: renumbered, sliced, remapped; or refused with the reason."""

import pytest

from tests.models import tiny_config
from tsp.errors import ModelError
from tsp.surgery import kept_layers, mended_config, renamed


def test_kept_layers():
    assert kept_layers(5, [3, 0]) == [1, 2, 4]
    assert kept_layers(3, []) == [0, 1, 2]


@pytest.mark.parametrize("dropped", [[5], [-1], [1, 1], [0, 1, 2, 3, 4]])
def test_impossible_drops_are_refused(dropped):
    with pytest.raises(ModelError, match=r"distinct, in \[0, 4\] and fewer than 5, got"):
        kept_layers(5, dropped)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.12.self_attn.layers.1.bias", "model.layers.3.self_attn.layers.1.bias"),
        ("model.layers.1.mlp.up_proj.weight", None),
        ("model.layers.11.x", "model.layers.2.x"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers_norm.1.weight", "model.layers_norm.1.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_renamed(name, expected):
    assert renamed(name, "model.layers", [0, 2, 11, 12]) == expected


@pytest.mark.parametrize(
    ("family", "count"), [("llama", "num_hidden_layers"), ("opt", "num_hidden_layers"), ("gpt2", "n_layer")]
)
def test_the_count_is_mended_under_the_familys_own_name(family, count):
    config = tiny_config(family, 6)
    mended = mended_config(config, [0, 2, 5])
    assert (mended.num_hidden_layers, mended.to_dict()[count]) == (3, 3)
    assert config.num_hidden_layers == 6, "the dense model's config stays"


def test_one_entry_per_layer_is_sliced():
    config = tiny_config("gemma2", 6)
    kinds = list(config.layer_types)
    mended = mended_config(config, [1, 2, 5])
    assert mended.layer_types == [kinds[1], kinds[2], kinds[5]]
    assert mended_config(tiny_config("qwen2", 6), [1, 5]).layer_types == ["full_attention", "sliding_attention"]


def test_lists_of_layer_indices_are_remapped():
    config = tiny_config("llama", 6)
    config.mlp_only_layers, config.full_attn_idxs, config.other_layers = [1, 4], (0, 5), []
    mended = mended_config(config, [0, 1, 3, 5])
    assert (mended.mlp_only_layers, mended.full_attn_idxs, mended.other_layers) == ([1], [0, 3], [])


def test_a_list_of_token_ids_that_happens_to_be_as_long_stays():
    config = tiny_config("llama", 3, eos_token_id=[1, 2, 3])
    assert mended_config(config, [0, 2]).eos_token_id == [1, 2, 3]


def test_nothing_dropped_changes_nothing():
    for family in ("llama", "qwen2", "gemma2", "opt", "gpt2", "qwen2_moe"):
        config = tiny_config(family, 4)
        assert mended_config(config, range(4)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("field", "value", "harmless"),
    [
        ("first_k_dense_replace", 2, 0),
        ("decoder_sparse_step", 2, 1),
        ("num_kv_shared_layers", 3, 0),
        ("moe_layer_freq", 2, 1),
    ],
)
def test_kinds_by_position_are_refused_and_harmless_values_pass(field, value, harmless):
    config = tiny_config("llama", 4)
    setattr(config, field, value)
    with pytest.raises(ModelError, match=f"config.{field} = {value} gives layers their kind by position"):
        mended_config(config, [0, 1, 3])
    setattr(config, field, harmless)
    assert mended_config(config, [0, 1, 3]).num_hidden_layers == 3

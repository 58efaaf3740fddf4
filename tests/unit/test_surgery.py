"""Names and config after a drop: renumbered, sliced, remapped; or refused with the reason."""

import pytest

from tests.models import tiny_config, tiny_model
from tsp.errors import ModelError
from tsp.surgery import check_kinds, kept_layers, layer_kinds, mended_config, renamed


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


KEPT = (0, 2, 3, 5)


@pytest.mark.parametrize(
    ("dense", "mended"),
    [
        # The first three are dense: of them 0 and 2 are left.
        ({"first_k_dense_replace": 3}, {"first_k_dense_replace": 2}),
        ({"first_k_dense_replace": 0}, {"first_k_dense_replace": 0}),
        ({"num_dense_layers": 1}, {"num_dense_layers": 1}),
        # The last three share keys and values: of them 3 and 5 are left.
        ({"num_kv_shared_layers": 3}, {"num_kv_shared_layers": 2}),
        # 1 and 4 are attention: none is left, and no step up to 4 hits a layer.
        ({"attn_layer_period": 3, "attn_layer_offset": 1}, {"attn_layer_period": 5, "attn_layer_offset": 4}),
        # 2 and 5 are attention: they are 1 and 3 now.
        ({"attn_layer_period": 3, "attn_layer_offset": 2}, {"attn_layer_period": 2, "attn_layer_offset": 1}),
        # Every second is sparse, but 3 is listed as dense; 0, 2 and 3 are dense, 5 is sparse.
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
            {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2]},
        ),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [1, 5]}, {"decoder_sparse_step": 1, "mlp_only_layers": [3]}),
        (
            {"attention_types": [[["g", "l"], 3]], "attention_layers": ["g", "l"] * 3},
            {"attention_types": [[["g"], 1], [["g"], 1], [["l"], 1], [["l"], 1]]},
        ),
        ({"block_types": ["r", "r", "a"]}, {"block_types": ["r", "a", "r", "a"]}),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": 4},
            {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
        ),
    ],
)
def test_what_a_family_derives_from_positions_says_the_same_of_the_kept_layers(dense, mended):
    config = tiny_config("llama", 6)
    for field, value in dense.items():
        setattr(config, field, value)
    result = mended_config(config, KEPT)
    assert {field: getattr(result, field) for field in mended} == mended
    assert {field: getattr(config, field) for field in dense} == dense, "the dense model's config stays"


def test_a_period_that_nothing_expresses_is_refused():
    config = tiny_config("llama", 6)
    config.attn_layer_period, config.attn_layer_offset = 2, 0
    with pytest.raises(ModelError, match=r"these would be layers \[0, 1, 3\], which no period expresses"):
        mended_config(config, (0, 2, 3, 4))


def test_a_layer_that_computes_with_its_index_cannot_move():
    config = tiny_config("gpt2", 4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx makes each layer depend on its position"):
        mended_config(config, (0, 2))
    assert mended_config(config, range(4)).num_hidden_layers == 4


class TestKinds:
    def kinds(self, **changes):
        return layer_kinds(tiny_model(num_layers=4, **changes).model.layers)

    def test_equal_layers_may_take_each_others_place(self):
        check_kinds(self.kinds(), layer_kinds(tiny_model(num_layers=2).model.layers), (1, 3))

    @pytest.mark.parametrize("changes", [{"intermediate_size": 64}, {"attention_bias": True}, {"hidden_act": "relu"}])
    def test_another_size_class_or_tensor_is_another_kind(self, changes):
        with pytest.raises(ModelError, match=r"layer 1 cannot become layer 0: its (mlp|self_attn)\."):
            check_kinds(self.kinds(), self.kinds(**changes)[:3], (1, 2, 3))

    def test_a_kind_of_attention_is_part_of_the_kind(self):
        dense = layer_kinds(tiny_model("gemma2", 4).model.layers)
        with pytest.raises(ModelError, match="layer_type is .full_attention. and would be .sliding_attention."):
            check_kinds(dense, dense[:2], (1, 3))

    def test_a_second_count_that_was_not_mended_is_seen(self):
        with pytest.raises(ModelError, match="counts its layers twice: that of 2 makes a model of 4"):
            check_kinds(self.kinds(), self.kinds(), (1, 3))

"""Sizes against the files on disk, the formula of plain attention, and caches of models that really ran."""

import pytest
import torch

from tests.families import family_model
from tests.models import model_folder, tiny_model
from tsp.config import ModelConfig
from tsp.drop import drop_layers
from tsp.sizes import cache_bytes_per_token, size_gib
from tsp.source import open_source


def source_of(folder):
    return open_source(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_the_size_is_that_of_the_file(tmp_path, family, dtype):
    source = source_of(model_folder(tmp_path / "dense", tiny_model(family), dtype))
    drop_layers(source, (1, 3), tmp_path / "pruned")
    for folder, dropped in (("dense", ()), ("pruned", (1, 3))):
        on_disk = (tmp_path / folder / "model.safetensors").stat().st_size
        # the header, of some bytes a tensor
        assert 0 <= on_disk - size_gib(source, dropped) * 2**30 < 200 * 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_plain_attention_it_is_the_formula(tmp_path, dtype):
    """Keys and values of 2 heads of 32 / 4 numbers in each of 5 layers."""
    source = source_of(model_folder(tmp_path / "dense", tiny_model(), dtype))
    a_layer = 2 * 2 * (32 // 4) * dtype.itemsize
    assert cache_bytes_per_token(source) == 5 * a_layer
    assert cache_bytes_per_token(source, (0, 3)) == 3 * a_layer


def ran(model):
    """Growth of a real cache from 8 to 16 tokens, summed by hand over its layers' keys and values."""
    sizes = []
    for length in (8, 16):
        with torch.no_grad():
            cache = model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
        held = [
            tensor
            for layer in cache.layers
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if tensor is not None
        ]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in held))
    return (sizes[1] - sizes[0]) / 8


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gemma4_text", "deepseek_v2", "gpt_oss", "bloom", "qwen3_next"])
def test_it_is_by_how_much_a_real_cache_grows(tmp_path, name):
    model = family_model(name)
    model.save_pretrained(tmp_path / name)
    assert cache_bytes_per_token(source_of(tmp_path / name)) == ran(model) > 0


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_a_state_does_not_grow(tmp_path, name):
    family_model(name).save_pretrained(tmp_path / name)
    assert cache_bytes_per_token(source_of(tmp_path / name)) == 0

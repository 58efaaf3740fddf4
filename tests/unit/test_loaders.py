"""`tsp verify --for`: what vLLM and llama.cpp's converter would stumble over, and the package gguf at work."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.models import model_folder, sharded, tiny_model
from tsp.cli import main
from tsp.config import ModelConfig
from tsp.drop import drop_layers
from tsp.loaders import LOADERS, check_loader, places_in_gguf
from tsp.shards import copy_tensors, read_header
from tsp.source import open_source


def source_of(folder):
    return open_source(ModelConfig(path=str(folder)))


@pytest.fixture
def pruned(tmp_path):
    dense = sharded(model_folder(tmp_path / "dense", tiny_model()), 2)
    return drop_layers(source_of(dense), (1, 3), tmp_path / "out")


def faults(folder, loader="vllm"):
    return list(check_loader(loader, source_of(folder)))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_good_one_has_no_faults(pruned, loader):
    assert faults(pruned, loader) == []


def test_a_gap_in_the_numbers(pruned):
    for path in pruned.glob("*.safetensors"):
        names = {name: name.replace("layers.2.", "layers.4.") for name in read_header(path).tensors}
        copy_tensors(path, path.with_suffix(".new"), names)
        path.with_suffix(".new").rename(path)
    index = pruned / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("layers.2.", "layers.4."))
    found = faults(pruned)
    assert "the layers' numbers have gaps: [0, 1, 4]" in found
    assert any("lacks" in fault and "layers.4." in fault for fault in faults(pruned, "gguf"))


def test_a_stale_list_and_a_stale_count(pruned):
    config = json.loads((pruned / "config.json").read_text())
    stale = {"n_layer": 5, "extra_layer_types": ["full"] * 5, "architectures": None}
    (pruned / "config.json").write_text(json.dumps(config | stale))
    found = "; ".join(faults(pruned))
    assert "config.json must count 3 layers" in found
    assert "extra_layer_types has 5 entries for 3 layers" in found
    assert "must name one architecture" in found


def test_gguf_can_be_written_from_it_and_read(pruned, tmp_path):
    """With llama.cpp's own package: its names, numbers of layers from 0, and the same values."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((pruned / "config.json").read_text())
    places = places_in_gguf(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    weights = {name: value for path in pruned.glob("*.safetensors") for name, value in load_file(path).items()}
    names = {places.get_name(name, try_suffixes=(".weight", ".bias")): name for name in weights}
    assert None not in names, names[None]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    for place, name in names.items():
        writer.add_tensor(place, weights[name].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.GGUFReader(tmp_path / "model.gguf")
    assert found.get_field("llama.block_count").contents() == 3
    read = {tensor.name: torch.tensor(tensor.data) for tensor in found.tensors}
    assert {name.split(".")[1] for name in read if name.startswith("blk.")} == {"0", "1", "2"}
    assert len(read) == len(weights)
    for place, name in names.items():
        assert torch.equal(read[place].reshape(weights[name].shape), weights[name].float())


def test_an_unknown_loader_is_wrong_input(pruned):
    done = CliRunner().invoke(main, ["verify", str(pruned), "--for", "vllm,ollama"])
    assert done.exit_code == 2
    assert "--for must be of vllm, gguf, got 'ollama'" in done.stderr

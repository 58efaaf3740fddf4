"""A model is checked before its weights are read: size, layers that others read, its own code, more than text."""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers

from tests.families import family_model
from tests.models import logits, model_folder, tiny_model, tiny_tokenizer, tokens
from tsp.checkpoint import load, prove, save_without
from tsp.config import ModelConfig
from tsp.drop import drop_layers
from tsp.errors import ModelError
from tsp.source import check_drop, open_source

CHECK_70B = """
import resource, sys, time
import torch
from tsp.config import ModelConfig
from tsp.source import check_drop, open_source

peak_gib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
import transformers.models.llama.modeling_llama
before, started = peak_gib(), time.perf_counter()
source = open_source(ModelConfig(path=sys.argv[1]))
check_drop(source, range(21, 61, 2))
print(time.perf_counter() - started, peak_gib() - before, source.num_parameters, source.stack, source.num_layers)
"""


def sparse_weights(model: torch.nn.Module, path: Path) -> None:
    """A file with the header of all the model's weights, and a hole where they would be."""
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


def test_a_model_of_70_billion_is_checked_in_seconds_and_without_memory(tmp_path):
    """The sizes of Llama-2 70B; its published count is 68,976,648,192 parameters.

    In a fresh process, as the peak of one that has run other tests would hide a growth.
    """
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        sparse_weights(transformers.LlamaForCausalLM(config), tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", CHECK_70B, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, gib, *found = done.stdout.split()[-5:]
    assert float(seconds) < 60
    assert float(gib) < 1
    assert found == ["68976648192", "model.layers", "80"]


def test_layers_whose_keys_others_read_must_stay(tmp_path):
    changes = {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
    model = family_model("gemma4_text", **changes)
    model.save_pretrained(tmp_path)
    source = open_source(ModelConfig(path=str(tmp_path)))
    assert source.read_by_others == {2, 3}, "the last of each kind before the two that share"
    with pytest.raises(ModelError, match=r"layers 2 of .* cannot go: later layers read their keys and values"):
        check_drop(source, (0, 2))
    with pytest.raises(ModelError, match="it has a part for each layer outside of the stack"):
        check_drop(source, (0, 4))


CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output
"""


@pytest.fixture
def with_own_code(tmp_path, monkeypatch) -> Path:
    """A folder whose model is a Llama with logits halved, by Python files that lie in it."""
    # transformers copies such files to a cache and imports them from there.
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = model_folder(tmp_path / "own", tiny_model())
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    return folder


def test_a_models_own_code_runs_only_when_trusted_and_goes_with_the_checkpoint(with_own_code, tmp_path):
    with pytest.raises(ModelError, match="brings its own Python code, which would run on this machine"):
        open_source(ModelConfig(path=str(with_own_code)))
    source = open_source(ModelConfig(path=str(with_own_code), trust_remote_code=True))
    decoder = load(source, torch.float32, nullcontext())
    decoder.model.eval()
    assert torch.allclose(logits(decoder.model, tokens()), 0.5 * logits(tiny_model(), tokens())), "its code ran"
    with decoder.bypassing((1, 3)):
        expected = logits(decoder.model, tokens())
    gathered = lambda *args, **kwargs: nullcontext()  # noqa: E731
    save_without(decoder, source, (1, 3), tmp_path / "job", gathered=gathered, write=True)
    drop_layers(source, (1, 3), tmp_path / "drop")
    for made in ("job", "drop"):
        assert (tmp_path / made / "modeling_own.py").read_text() == MODELING
        pruned = open_source(ModelConfig(path=str(tmp_path / made), trust_remote_code=True))
        assert prove(pruned, tokens(), expected)["faults"] == []
        with pytest.raises(ModelError, match="does not load"):
            prove(dataclasses.replace(pruned, trust_remote_code=False), tokens(), expected)


def test_of_a_folder_with_more_than_text_the_job_keeps_the_language_model(tmp_path):
    model = family_model("qwen3_5")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    source = open_source(ModelConfig(path=str(tmp_path / "dense")))
    assert source.text_only
    assert not open_source(ModelConfig(path=str(model_folder(tmp_path / "llama", tiny_model())))).text_only
    drop_layers(source, (1, 3), tmp_path / "drop")
    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "drop")
    assert whole.config.text_config.num_hidden_layers == 4
    for name, tensor in model.state_dict().items():
        if ".visual." in name:
            assert torch.equal(whole.state_dict()[name], tensor), "the image encoder is as it was"
    decoder = load(source, torch.float32, nullcontext())
    gathered = lambda *args, **kwargs: nullcontext()  # noqa: E731
    save_without(decoder, source, (1, 3), tmp_path / "job", gathered=gathered, write=True)
    config = json.loads((tmp_path / "job" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 4

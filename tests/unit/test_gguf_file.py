"""GGUF files: read back by the package gguf and by transformers; what would be read otherwise is refused.

llama.cpp itself is no dependency of the tests. By hand, llama-cpp-python 0.3.36 (2026-11-26): the demo model and
stories260k, no difference in the tokens of 991 texts (code, other scripts, emoji), mean KL of the predictions 8e-6.
"""

import json
import shutil
import sys

import pytest
import torch
import transformers

from tests.models import REPOSITORY
from tests.unit.test_tracking_registry import make_checkpoint
from tsp.errors import ConfigError, ModelError
from tsp.gguf_file import write_gguf

gguf = pytest.importorskip("gguf")
SMALL = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "model")


def save(folder, config, dtype=torch.float32):
    """Random weights in place of the folder's; norms are no ones, so that a shift of theirs shows."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def change(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_gguf(folder, out / "model.gguf")
    return gguf.GGUFReader(out / "model.gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SMALL, rope_theta=500.0, rms_norm_eps=1e-3, tie_word_embeddings=True),
        transformers.Qwen2Config(**SMALL, rope_theta=2000.0),
        transformers.Qwen3Config(**SMALL, head_dim=128),
    ],
    ids=lambda config: config.model_type,
)
def test_transformers_reads_the_same_model(folder, tmp_path, config, dtype):
    model = save(folder, config, dtype)
    file = read(folder, tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=dtype)
    tokens = torch.arange(60)[None]
    assert torch.equal(found(tokens).logits, model(tokens).logits)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["blk.2.ffn_up.weight"] == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype)[6:]]
    assert ("output.weight" in kinds) is not config.tie_word_embeddings


def test_rows_of_queries_lie_as_llama_cpp_wants_them(folder, tmp_path):
    """The two halves of a head are interleaved: its rotation works on neighbours, transformers' on halves."""
    model = save(folder, transformers.LlamaConfig(**SMALL))
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in read(folder, tmp_path).tensors}
    query = model.model.layers[1].self_attn.q_proj.weight.detach()
    order = [head * 4 + row for head in range(4) for row in (0, 2, 1, 3)]
    assert torch.equal(stored["blk.1.attn_q.weight"], query[order])


def test_the_demo_model_and_its_vocabulary(tmp_path):
    demo = REPOSITORY / "tsp" / "demo" / "model"
    file = read(demo, tmp_path)
    words = json.loads((demo / "tokenizer.json").read_text())["model"]
    tokens = file.get_field("tokenizer.ggml.tokens").contents()
    assert {token: number for number, token in enumerate(tokens) if token in words["vocab"]} == words["vocab"]
    assert file.get_field("tokenizer.ggml.merges").contents() == [" ".join(pair) for pair in words["merges"]]
    assert file.get_field("tokenizer.ggml.pre").contents() == "dbrx"
    assert file.get_field("tokenizer.ggml.add_bos_token").contents() is True
    assert file.get_field("llama.block_count").contents() == 16


def test_what_was_sentencepiece_is_joined_in_the_order_of_its_merges(folder, tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "\u2581": 4, "a": 5, "b": 6, "ab": 7, "\u2581ab": 8}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    change(
        folder,
        model={
            "type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["\u2581", "ab"]], "byte_fallback": True,
            "unk_token": "<unk>",
        },
        added_tokens=[{"id": number, "content": token} | special for token, number in list(vocabulary.items())[:3]],
        normalizer={"type": "Prepend", "prepend": "\u2581"},
        pre_tokenizer=None,
    )  # fmt: skip
    file = read(folder, tmp_path)
    assert file.get_field("tokenizer.ggml.model").contents() == "llama"
    assert file.get_field("tokenizer.ggml.scores").contents()[5:10] == [0, 0, 0, -1, 0]
    assert file.get_field("tokenizer.ggml.token_type").contents()[:6] == [2, 3, 3, 6, 1, 1]
    assert file.get_field("tokenizer.ggml.add_space_prefix").contents() is True


def refusal(folder, tmp_path):
    with pytest.raises(ModelError, match="--format gguf cannot hold") as error:
        write_gguf(folder, tmp_path / "model.gguf")
    assert "convert_hf_to_gguf.py" in str(error.value)
    return str(error.value)


def test_what_transformers_does_not_read_is_refused(folder, tmp_path):
    config = transformers.GPTNeoXConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    save(folder, config)
    assert "a model of type gpt_neox" in refusal(folder, tmp_path)


def test_a_setting_that_gets_lost_is_refused(folder, tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    save(folder, transformers.LlamaConfig(**SMALL, rope_parameters=scaled))
    assert "rope_type 'linear'" in refusal(folder, tmp_path)
    # The width of a head is not written, and not 128: found by what is read.
    save(folder, transformers.Qwen3Config(**SMALL, head_dim=16))
    refusal(folder, tmp_path)
    save(folder, transformers.LlamaConfig(**SMALL, hidden_act="gelu"))
    assert "what is read predicts otherwise" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": None},
        {"model": {"type": "WordPiece", "vocab": {}}},
    ],
)
def test_a_text_that_would_be_split_otherwise_is_refused(folder, tmp_path, changes):
    change(folder, **changes)
    assert "a tokenizer " in refusal(folder, tmp_path)


def test_a_tokenizer_file_from_before_a_setting_means_its_default(folder, tmp_path):
    """Those of 2019 have no `use_regex`."""
    save(folder, transformers.LlamaConfig(**SMALL))
    change(folder, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    with_it = _splits(read(folder, tmp_path))
    shutil.rmtree(tmp_path / "out")
    change(folder, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True})
    assert _splits(read(folder, tmp_path)) == with_it


def _splits(reader):
    return reader.get_field("tokenizer.ggml.pre").contents()


def test_there_must_be_a_tokenizer_and_the_package(folder, tmp_path, monkeypatch):
    (folder / "tokenizer.json").unlink()
    assert "without tokenizer.json" in refusal(folder, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'tsp\[gguf\]'"):
        write_gguf(folder, tmp_path / "model.gguf")

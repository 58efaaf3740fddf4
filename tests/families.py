"""Tiny models of many families, built from their own configs, and the way each is taken through; nothing is downloaded.

`SMALL` is given to every config that knows the field; a family's own entry says what it needs beyond that.

    python -m tests.families > docs/families.md
"""

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 96
LAYERS = 6

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "embed_dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "rotary_dim": 8,
    "sliding_window": 8,
    "window_size": 8,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # state spaces and linear attention
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "initializer_range": 0.2,
    "init_std": 0.2,
}

# Beyond SMALL.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "opt": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_bigcode": {},
    "gptj": {},
    "bloom": {},
    "falcon": {},
    "stablelm": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "cohere": {},
    "cohere2": {},
    "starcoder2": {},
    "granite": {},
    "granitemoe": {},
    "mpt": {},
    "codegen": {},
    "mixtral": {},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3_moe": {"mlp_only_layers": [1, 4]},
    "olmoe": {},
    "deepseek_v2": {"first_k_dense_replace": 3, "num_key_value_heads": 4},
    "deepseek_v3": {"first_k_dense_replace": 3, "num_key_value_heads": 4},
    "dots1": {"first_k_dense_replace": 3, "n_shared_experts": 1},
    "smollm3": {},
    "exaone4": {},
    "nemotron": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"first_k_dense_replace": 3},
    "gpt_oss": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_layer_start_index": 2},
    "helium": {},
    "hunyuan_v1_dense": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "falcon_mamba": {},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 4], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "lfm2": {},
    "lfm2_moe": {"num_dense_layers": 2, "layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "minimax": {},
    "diffllama": {},
    "roberta": {},
    "arcee": {},
    "apertus": {},
    "seed_oss": {},
    "persimmon": {},
    "xglm": {"attention_heads": 4},
    "biogpt": {},
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "zamba2": {"hybrid_layer_ids": [1, 4], "layer_types": ["mamba", "hybrid", "mamba"] * (LAYERS // 3)},
    # composite: an image encoder beside the text
    "gemma3": {},
    "gemma4": {"pad_token_id": 2, "hidden_size_per_layer_input": 0},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "llama4": {"num_experts_per_tok": 1},
    "qwen3_5": {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "fuyu": {},
    "got_ocr2": {},
    "mistral3": {},
    "llava": {},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "num_kv_shared_layers": 2},
}

# Beyond SMALL they need nothing; taken through by `-m slow` and by the script.
FURTHER = (
    "afmoe aria_text bitnet cohere2_moe ctrl cwm deepseek_v4 doge exaone_moe flex_olmo flint "
    "git gpt-sw3 granite_swa granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 hyperclovax "
    "inkling_text internlm3 iquestcoder jais2 kolibri1 laguna lfm3 mellum mimo_v2_flash minimax_m2 "
    "minimax_m3_vl_text ministral3 moss_transcribe_diarize nanochat nemotron_h phimoe solar_open "
    "vaultgemma "
)
FAMILIES |= {name: {} for name in FURTHER.split()}

# Why a family is refused, as far as the message goes.
REFUSED = {
    "mistral3": "has no causal language model for mistral3",
    "llava": "has no causal language model for llava",
    "diffllama": "self_attn.lambda_init",
    "roberta": "is_decoder: false",
    "minimax": "self_attn.num_hidden_layers is 6 and would be 4",
    "zamba2": "adapter_list",
    "gemma3n_text": "it has a part for each layer outside of the stack",
}
DROPPED = (1, 3)


# Of the parts beside the text of a composite config (images, sound), over SMALL.
BESIDE_TEXT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "image_size": 28,
    "patch_size": 14,
    "spatial_merge_size": 1,
    "out_hidden_size": 32,
    "num_key_value_heads": 4,
}


def family_config(name: str, **changes: Any) -> Any:
    """The tiny config of a family."""
    from transformers import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[name], SMALL, FAMILIES[name] | changes)


def _small(kind: Any, small: dict[str, Any], beyond: dict[str, Any]) -> Any:
    known = kind()
    fields = {field: value for field, value in small.items() if field in vars(known)}
    text = known.get_text_config(decoder=True)
    if text is known:
        return kind(**fields | beyond)
    for part in [name for name in kind.sub_configs if getattr(known, name) is not None]:
        own = getattr(known, part)
        is_text = own is text
        fields[part] = _small(type(own), small if is_text else small | BESIDE_TEXT, beyond if is_text else {}).to_dict()
    return kind(**fields)


def family_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model in fp32, in evaluation mode; of a composite config the whole, with what is beside the text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    config = family_config(name, **changes)
    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind: Any = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    torch.manual_seed(seed)
    return kind.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def take_through(name: str, folder: Path) -> Path:
    """Discovery, gates, a step of stage 1, drop in memory and on disk, reload, generate; the pruned folder.

    Raises:
        ModelError: the family is refused.
        AssertionError: something is wrong.
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tests.models import bench, job, logits, tiny_tokenizer
    from tsp.checkpoint import load, save_without
    from tsp.config import ModelConfig
    from tsp.drop import drop_layers
    from tsp.gates import Gates
    from tsp.methods.trsp.stage1 import score
    from tsp.source import check_drop, open_source

    model = family_model(name)
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    source = open_source(ModelConfig(path=str(folder / "dense")))
    free = [index for index in range(1, LAYERS) if index not in source.read_by_others]
    dropped = tuple(sorted(sorted(free, key=lambda index: index % 2 == 0)[: len(DROPPED)]))
    check_drop(source, dropped)
    decoder = load(source, torch.float32, nullcontext())
    decoder.model.eval()
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    dense = logits(decoder.model, ids)
    assert torch.equal(dense, logits(model, ids)), "as it was loaded it is the model that was saved"

    with Gates(decoder).attached():
        assert torch.equal(logits(decoder.model, ids), dense), "gates at 1 change nothing"
    assert torch.equal(logits(decoder.model, ids), dense), "and leave no trace"
    learned = job(stage1__schedule="budget", stage1__steps=2, stage1__lr=0.1, data__block_tokens=12)
    made = bench(decoder.model, ids.repeat(4, 1), learned)
    with made.engine.mounted(decoder.model) as made.model:
        gates = score(made, 2)
    assert min(gates.values) < 1, "a gate moved"
    decoder.model.eval()

    with decoder.bypassing(dropped):
        expected = logits(decoder.model, ids)
    assert not torch.allclose(expected, dense, atol=1e-3), "the layers matter"
    with decoder.bypassing(dropped[:1]), decoder.hidden_states() as states:
        logits(decoder.model, ids)
    with decoder.bypassing(dropped[:1]), decoder.leaving_out_each(dropped[1:2], states):
        assert torch.equal(logits(decoder.model, ids), expected), "the layers before need not be computed again"
    others = [index for index in range(dropped[1], decoder.num_layers) if index not in source.read_by_others]
    with decoder.bypassing(dropped[:1]), decoder.leaving_out_each(others, states):
        at_once = logits(decoder.model, ids.repeat(len(others), 1)).chunk(len(others))
    for index, found in zip(others, at_once, strict=True):
        with decoder.bypassing({dropped[0], index}):
            assert torch.allclose(logits(decoder.model, ids), found, atol=1e-4), f"without layer {index}"
    gathered = lambda *args, **kwargs: nullcontext()  # noqa: E731
    save_without(decoder, source, dropped, folder / "pruned", gathered=gathered, write=True)
    drop_layers(source, dropped, folder / "on-disk")
    files = [set(load_file(folder / kind / "model.safetensors")) for kind in ("pruned", "on-disk")]
    assert files[0] == files[1] or source.text_only, "the job names tensors as the dense model's file does"
    prompt = ids[:1, :6]
    for kind in ("pruned", "on-disk"):
        reloaded, info = AutoModelForCausalLM.from_pretrained(folder / kind, output_loading_info=True)
        if source.text_only and kind == "on-disk":
            info["unexpected_keys"] = ()  # what is beside the text stays in that folder
        assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), (kind, info)
        assert torch.allclose(logits(reloaded.eval(), ids), expected, atol=1e-4), kind
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
        cached, uncached = (reloaded.generate(prompt, use_cache=c, pad_token_id=0, **options) for c in (True, False))
        assert torch.equal(cached, uncached), kind
    return folder / "pruned"


def table() -> str:
    """The families and what becomes of each, as Markdown."""
    import transformers

    from tsp.errors import ModelError

    rows = []
    for name in sorted(FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                take_through(name, Path(folder))
                rows.append((name, "works", ""))
            except ModelError as error:
                rows.append((name, "refused", str(error).replace(folder, "")))
            print(*rows[-1], file=sys.stderr)
    works = sum(state == "works" for _, state, _ in rows)
    lines = "\n".join(f"| {name} | {state} | {why} |" for name, state, why in rows)
    return f"""# Families

Tiny random models of {len(rows)} model types of transformers {transformers.__version__}, each taken through discovery,
gates, a step of stage 1, the drop of two layers that do not touch (in memory and on disk), reloading with transformers
alone, and generation with and without cache: {works} work. No family is known by name; one that is not listed works if
its structure allows, and is refused with the reason if it does not. Made by `python -m tests.families`.

| model type | | why |
|---|---|---|
{lines}
"""


if __name__ == "__main__":
    print(table(), end="")

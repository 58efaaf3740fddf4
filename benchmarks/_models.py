"""Shapes of well-known models; their weights, where there are any, are random."""

from typing import Any

from transformers import LlamaConfig

# Layers, hidden, MLP, heads, key heads, vocabulary.
SHAPES = {
    "tiny": (4, 64, 128, 4, 2, 512),
    "135m": (30, 576, 1536, 9, 3, 49152),  # SmolLM
    "0.5b": (24, 896, 4864, 14, 2, 151936),  # Qwen 2.5
    "1b": (16, 2048, 8192, 32, 8, 128256),  # Llama 3.2
    "7b": (32, 4096, 11008, 32, 32, 32000),  # Llama 2
    "13b": (40, 5120, 13824, 40, 40, 32000),
    "70b": (80, 8192, 28672, 64, 8, 128256),  # Llama 3.1
    "405b": (126, 16384, 53248, 128, 8, 128256),
}
_TIED = ("tiny", "135m", "0.5b", "1b")


def llama_config(name: str, positions: int) -> Any:
    """A Llama of that shape.

    Args:
        name: one of `SHAPES`.
        positions: tokens that a sequence may have.
    """
    layers, hidden, mlp, heads, key_heads, vocabulary = SHAPES[name]
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=positions,
        tie_word_embeddings=name in _TIED,
    )  # fmt: skip

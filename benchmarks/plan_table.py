"""The table of `docs/performance.md`: what `tsp plan` says of four sizes on 1 to 64 GPUs.

    python benchmarks/plan_table.py [--gpu h100-80]

Llamas by their shape alone, the default job with 128 sequences of 2,048 tokens, `train.batch_size` 64, so that each of
64 ranks has a sequence, and activation checkpointing. Prints a table in Markdown.
"""

import argparse
import tempfile
from pathlib import Path

from tqdm import tqdm
from transformers import LlamaConfig

from tsp.capacity import Estimate, Fleet
from tsp.config import ModelConfig, known_gpu, load_config
from tsp.footprint import shape_of
from tsp.sharding import read_json

ZERO3 = Path(__file__).parent.parent / "ds_configs/zero3.json"
# Layers, hidden, MLP, heads, key heads, vocabulary: Llama 2 7B and 13B, Llama 3.1 70B and 405B.
SHAPES = {
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "13B": (40, 5120, 13824, 40, 40, 32000),
    "70B": (80, 8192, 28672, 64, 8, 128256),
    "405B": (126, 16384, 53248, 128, 8, 128256),
}
FLEETS = ((1, 1), (1, 8), (2, 8), (8, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100-80")
    args = parser.parse_args()
    gpu, sharding, rows = known_gpu(args.gpu), read_json(ZERO3), []
    for name, sizes in tqdm(SHAPES.items(), leave=False):
        layers, hidden, mlp, heads, key_heads, vocabulary = sizes
        with tempfile.TemporaryDirectory() as folder:
            LlamaConfig(
                num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads,
                num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=4096,
                tie_word_embeddings=False,
            ).save_pretrained(folder)  # fmt: skip
            shape = shape_of(ModelConfig(path=folder))
        for nodes, gpus in FLEETS:
            train = {"batch_size": 64, "accumulation": 64 // (nodes * gpus), "activation_checkpointing": True}
            config = load_config([{"train": train, "eval": {"batch_size": 1}}])
            found = Estimate(config, shape, sharding, Fleet(nodes=nodes, gpus=gpus, gpu=gpu))
            times = " | ".join(f"{phase.seconds(found.fleet) / 60:,.1f}" for phase in found.phases)
            verdict = "yes" if found.fits else "no"
            rows.append(f"| {name} | {nodes * gpus} | {found.peak_gib:,.1f} | {verdict} | {times} |")
    print("| model | GPUs | GiB a rank | fits | evaluate, min | select, min | transfer, min |")
    print("|---|---:|---:|---|---:|---:|---:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

"""Memory and time of `tsp drop` on a synthetic checkpoint of 2 GiB in 8 shards.

    python benchmarks/drop_memory.py [--json]

The peak is the resident memory of the command as the system counts it, imports included.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _rows import row, show
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GIB = 2**30
NUM_SHARDS, NUM_LAYERS = 8, 16
REPOSITORY = Path(__file__).parent.parent
DEMO = REPOSITORY / "tsp" / "demo" / "model"


def write_checkpoint(folder: Path) -> float:
    """A Llama of 16 layers with random numbers, two layers a shard; GiB."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=7168, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    shards: list[list[str]] = [[] for _ in range(NUM_SHARDS)]
    for name in shapes:
        number = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        shards[number * NUM_SHARDS // NUM_LAYERS].append(name)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"
        tensors = {name: torch.randn(shapes[name]).bfloat16() for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "dense"
        folder.mkdir()
        size_gib = write_checkpoint(folder)
        command = [sys.executable, "-m", "tsp", "drop", str(folder), "--layers", "3,7,9", "--output", f"{place}/out"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        started = time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB
    show(
        [
            row("drop_checkpoint_gib", size_gib, ">=", 1.9),
            row("drop_peak_gib", peak_gib, "<=", 1.5),
            row("drop_s", seconds, "<=", 60.0),
        ],
        as_json=args.json,
    )


if __name__ == "__main__":
    main()

"""The table of `docs/performance.md`: what `tsp plan` says of four sizes on 1 to 64 GPUs.

    python benchmarks/plan_table.py [--gpu h100-80]

Llamas by their shape alone, the default job with 128 sequences of 2,048 tokens, `train.batch_size` 64, so that each of
64 ranks has a sequence, and activation checkpointing. Prints a table in Markdown.
"""

import argparse
import tempfile
from pathlib import Path

from _models import llama_config
from tqdm import tqdm

from tsp.capacity import Estimate, Fleet
from tsp.config import ModelConfig, known_gpu, load_config
from tsp.footprint import shape_of
from tsp.sharding import read_json

ZERO3 = Path(__file__).parent.parent / "ds_configs/zero3.json"
SIZES = ("7b", "13b", "70b", "405b")
FLEETS = ((1, 1), (1, 8), (2, 8), (8, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100-80")
    args = parser.parse_args()
    gpu, sharding, rows = known_gpu(args.gpu), read_json(ZERO3), []
    for name in tqdm(SIZES, leave=False):
        with tempfile.TemporaryDirectory() as folder:
            llama_config(name, 4096).save_pretrained(folder)
            shape = shape_of(ModelConfig(path=folder))
        for nodes, gpus in FLEETS:
            train = {"batch_size": 64, "accumulation": 64 // (nodes * gpus), "activation_checkpointing": True}
            config = load_config([{"train": train}])
            found = Estimate(config, shape, sharding, Fleet(nodes=nodes, gpus=gpus, gpu=gpu))
            times = " | ".join(f"{phase.seconds(found.fleet) / 60:,.1f}" for phase in found.phases)
            verdict = "yes" if found.fits else "no"
            rows.append(f"| {name.upper()} | {nodes * gpus} | {found.peak_gib:,.1f} | {verdict} | {times} |")
    print("| model | GPUs | GiB a rank | fits | evaluate, min | select, min | transfer, min |")
    print("|---|---:|---:|---|---:|---:|---:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

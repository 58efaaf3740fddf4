"""What each rank holds, against what `tsp plan` said: weights and peak, on 1, 2 and 4 ranks of this machine.

    python benchmarks/memory.py [--ranks 1,2,4] [--json]

A Llama of 0.1 billion weights (random) goes through a job with adapters under ZeRO-3. The plan is made beforehand, with
what `--calibrate` finds; on a CPU the peak is the resident memory of the process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _jobs import settings
from _rows import row, show
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).parent.parent / "tsp" / "demo" / "model"
BIN = Path(sys.executable).parent
JUDGED = (1, 2)
SETTINGS = settings(
    train__batch_size=4,
    data__block_tokens=256,
    data__max_blocks=16,
    eval__block_tokens=256,
    eval__max_blocks=4,
    eval__batch_size=1,
    eval__speed_runs=0,
    eval__prompts=0,
    eval__compare_positions=0,
    stage1__schedule="budget",
    stage1__steps=2,
    prune__swap_rounds=0,
    prune__verify_blocks=4,
    stage2__steps=2,
    stage2__lr=1e-4,
    save="false",
)


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)


def called(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4", help="a comma list")
    parser.add_argument("--json", action="store_true", help="print rows for benchmarks/results.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        write_model(model)
        for ranks in map(int, args.ranks.split(",")):
            words = ["--model", model, "--data", "stdlib", *SETTINGS]
            said = json.loads(called(BIN / "tsp", "plan", "--calibrate", "--json", "--gpus", ranks, *words))
            output = Path(place) / f"out-{ranks}"
            called(BIN / "tsp", "prune", "--nproc", ranks, "--output", output, *words)
            found = json.loads((output / "result.json").read_text())
            peak, share = max(found["peak_memory_gib"]), max(found["weights_gib"])
            whole = 4 * found["parameters"]["dense"] / 2**30
            phases = ", ".join(f"{phase['name']} {phase['total_gib']:.2f}" for phase in said["phases"])
            held = f"{share:.3f} of {whole:.3f} GiB of weights, peak {peak:.2f} GiB"
            print(f"{ranks} ranks: {held}, planned {said['peak_gib']:.2f} ({phases})", file=sys.stderr)
            rows.append(row(f"weights_of_share_{ranks}_ranks", share / (whole / ranks), "<=", 1.1))
            if ranks in JUDGED:
                rows.append(row(f"peak_of_plan_{ranks}_ranks", peak / said["peak_gib"], "<=", 1.1))
                rows.append(row(f"plan_of_peak_{ranks}_ranks", said["peak_gib"] / peak, "<=", 1.1))
    show(rows, as_json=args.json)


if __name__ == "__main__":
    main()

"""The model card of the demo checkpoint, from the record of its training."""

from typing import Any


def model_card(record: dict[str, Any], curve: list[dict[str, Any]]) -> str:
    """The card of a training: `record` as in `training.json`, and the curve's rows."""
    recipe = record["recipe"]
    restarts = ", ".join(f"{tokens:,}" for tokens in record["optimizer_restarts"])
    anew = f"; the optimizers started anew, from bf16 weights, at {restarts} tokens" if restarts else ""
    rows = "\n".join(
        f"| {row['tokens']:,} | {row['seconds']:,} | {row['loss']:.3f} | {row['held_out_ppl']:.2f} |" for row in curve
    )
    return f"""---
license: apache-2.0
library_name: transformers
---
# The demo model of tsp

A Llama-architecture model of {record["parameters"]:,} parameters ({recipe["num_layers"]} layers of width
{recipe["hidden_size"]}, vocabulary {recipe["vocab_size"]:,}, {recipe["block_tokens"]} positions), made to be
pruned in minutes on a laptop. It continues Python source text, badly; it is of no other use.

| | |
|---|---|
| data | train split of the sources of Python {record["python"]}'s standard library (`tsp/demo/corpus.py`) |
| tokens | {record["tokens"]:,} ({record["epochs"]} epochs){anew} |
| held-out perplexity | {record["held_out_ppl"]} (modules it never saw, windows of {recipe["block_tokens"]}) |
| seed | {recipe["seed"]} |
| time | {record["seconds"]:,} s |
| machine | {record["machine"]} |
| made by | `tsp demo train --output DIR --compile`; all settings in `training.json` |

| tokens | seconds | train loss | held-out perplexity |
|---:|---:|---:|---:|
{rows}
"""

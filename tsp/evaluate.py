"""`tsp evaluate`: the perplexity of a whole model on some corpora, without pruning anything."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tsp.checkpoint import load
from tsp.config import JobConfig
from tsp.data import load_evaluation
from tsp.engine import Engine
from tsp.evaluation.perplexity import perplexity, window_losses
from tsp.pipeline import located
from tsp.source import load_tokenizer, open_source

SCHEMA = 1


def evaluate_model(config: JobConfig, root: Path) -> dict[str, Any]:
    """Load a model on one rank and measure it.

    Args:
        config: `model` and `eval` are read.
        root: working directory; the registry of `models:/...` is the one of its store.

    Returns:
        `{schema, model, perplexity: {corpus: {ppl, num_windows, block_tokens}}}`.

    Raises:
        TspError: with exit code 2 for a model or corpus that cannot be used.
    """
    source = open_source(located(config.model, root))
    corpora = load_evaluation(config, load_tokenizer(source), source.max_positions)
    engine = Engine.start(config, {"zero_optimization": {"stage": 0}})
    decoder = load(source, engine.dtype, engine.loading(), trust=config.model.trust_remote_code)
    measured = {}
    with engine.mounted(decoder.model) as model, torch.no_grad():
        for corpus in corpora:
            losses = window_losses(
                model, corpus.blocks, batch_size=config.eval.batch_size, device=engine.device, name=corpus.name
            )
            record = asdict(perplexity(losses, corpus.blocks.shape[1]))
            del record["window_losses"]
            measured[corpus.name] = record
    engine.stop()
    return {"schema": SCHEMA, "model": source.name, "perplexity": measured}

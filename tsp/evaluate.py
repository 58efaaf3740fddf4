"""`tsp evaluate`: the perplexity of a whole model on some corpora, without pruning anything; on any number of ranks."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tsp.checkpoint import load
from tsp.config import JobConfig
from tsp.data import load_evaluation
from tsp.engine import Engine
from tsp.evaluation.perplexity import perplexity, window_losses
from tsp.machine import weights_dtype
from tsp.sharding import read_json, resolve
from tsp.source import load_tokenizer, open_source
from tsp.tracking.registry import located

SCHEMA = 1


def evaluate_model(config: JobConfig, ds_path: Path | None, *, root: Path, world_size: int) -> dict[str, Any]:
    """Load a model and measure it; the same call on every rank.

    Args:
        config: `model` and `eval` are read.
        ds_path: DeepSpeed JSON that says how to shard; None: every rank holds the whole model.
        root: working directory; the registry of `models:/...` is the one of its store.
        world_size: ranks; they share the windows.

    Returns:
        `{schema, model, perplexity: {corpus: {ppl, num_windows, block_tokens}}}`.

    Raises:
        TspError: with exit code 2 for a model or corpus that cannot be used.
    """
    content = {"zero_optimization": {"stage": 0}} if ds_path is None else read_json(ds_path)
    source = open_source(located(config.model, root))
    corpora = load_evaluation(config, load_tokenizer(source), source.max_positions)
    dtype = weights_dtype(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # Nothing is trained: any batch that the ranks divide will do.
    train = config.train.model_copy(update={"batch_size": world_size, "accumulation": 1})
    config = config.model_copy(update={"train": train})
    hidden_size = source.config.get_text_config(decoder=True).hidden_size
    engine = Engine.start(config, resolve(content, config, world_size=world_size, hidden_size=hidden_size, dtype=dtype))
    decoder = load(source, engine.dtype, engine.loading())
    measured = {}
    with engine.mounted(decoder.model) as model:
        for corpus in corpora:
            sharing = engine.sharing(config.eval.batch_size)
            losses = window_losses(model, corpus.blocks, **sharing, name=corpus.name)
            record = asdict(perplexity(losses, corpus.blocks.shape[1]))
            del record["window_losses"]
            measured[corpus.name] = record
    engine.stop()
    return {"schema": SCHEMA, "model": source.name, "perplexity": measured}

"""`tsp evaluate`: measure a whole model, alone or against the dense one it came from; on any number of ranks."""

from pathlib import Path
from typing import Any

import torch

from tsp.checkpoint import load
from tsp.config import JobConfig, ModelConfig
from tsp.data import load_corpora, load_evaluation
from tsp.demo import NAME as DEMO_NAME
from tsp.engine import Engine
from tsp.errors import ModelError
from tsp.evaluation.generation_speed import check_fits, generation_tokens_per_s
from tsp.evaluation.state import Exam, evaluate_state
from tsp.evaluation.summary import summarise
from tsp.evaluation.zero_shot import open_tasks
from tsp.machine import weights_dtype
from tsp.records import Evaluation
from tsp.sharding import read_json, resolve
from tsp.sizes import cache_bytes_per_token, size_gib
from tsp.source import Source, load_tokenizer, open_source
from tsp.tracking.fetch import located

SCHEMA = 1


def evaluate_model(
    config: JobConfig, ds_path: Path | None, *, root: Path, world_size: int, against: ModelConfig | None = None
) -> dict[str, Any]:
    """Load a model and measure it; the same call on every rank.

    Args:
        config: `model` and `eval` are read, and `data` where `eval.sources` names nothing: what is held out of it.
        ds_path: DeepSpeed JSON that says how to shard; None: every rank holds the whole model.
        root: working directory; the registry of `models:/...` is the one of its store.
        world_size: ranks; they share the windows.
        against: the dense model, measured first and compared with; None: nothing is compared.

    Returns:
        `{schema, model, against, perplexity: {corpus: {ppl, num_windows, block_tokens}}, ...}`; the other keys are
        those of `summary.summarise` and sizes, by state: `dense` (of `against`) and `model`.

    Raises:
        TspError: with exit code 2 for a model, corpus or task that cannot be used.
    """
    content = {"zero_optimization": {"stage": 0}} if ds_path is None else read_json(ds_path)
    sources = _open(config, against, root)
    source = sources["model"]
    tokenizer = load_tokenizer(source)
    max_positions = min(one.max_positions for one in sources.values())
    check_fits(config.eval, max_positions)
    if config.eval.sources:
        corpora = load_evaluation(config, tokenizer, max_positions)
    else:
        corpora = load_corpora(config, tokenizer, max_positions).evals
    tasks = open_tasks(config.eval, tokenizer, max_positions)
    dtype = weights_dtype(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    # Nothing is trained: any batch that the ranks divide will do.
    train = config.train.model_copy(update={"batch_size": world_size, "accumulation": 1})
    config = config.model_copy(update={"train": train})
    hidden_size = source.config.get_text_config(decoder=True).hidden_size
    engine = Engine.start(config, resolve(content, config, world_size=world_size, hidden_size=hidden_size, dtype=dtype))
    exam = Exam(
        config=config.eval,
        corpora=corpora,
        max_positions=max_positions,
        sharing=engine.sharing(config.eval.batch_size),
        tasks=tasks,
    )
    states: dict[str, Evaluation] = {}
    generation: dict[str, float] = {}
    for state, one in sources.items():
        decoder = load(one, engine.dtype, engine.loading())
        weights_gib = engine.weights_gib(decoder.model)
        with engine.mounted(decoder.model) as model:
            states[state] = evaluate_state(exam, model, state)
            # In shards it would measure the network.
            if config.eval.generation_runs and engine.zero_stage < 3:
                generation[state] = generation_tokens_per_s(decoder.model, config.eval)
        del decoder, model
    measured = summarise(states)
    measured["speed"]["generation_tokens_per_s"] = generation
    peak_memory_gib = engine.peak_memory_gib()
    engine.stop()
    return {
        "schema": SCHEMA,
        "model": source.name,
        "against": (against.path or DEMO_NAME) if against else None,
        "corpora": {corpus.name: corpus.about("num_windows") for corpus in corpora},
        "perplexity": {
            corpus: {"ppl": row.ppl, "num_windows": row.num_windows, "block_tokens": row.block_tokens}
            for corpus, row in states["model"].perplexity.items()
        },
        "ppl": measured.pop("perplexity"),
        "asked_tasks": list(config.eval.tasks),
        **measured,
        "parameters": {state: one.num_parameters for state, one in sources.items()},
        "size_gib": {state: size_gib(one) for state, one in sources.items()},
        "kv_cache_bytes_per_token": {state: cache_bytes_per_token(one) for state, one in sources.items()},
        "weights_gib": weights_gib,
        "peak_memory_gib": peak_memory_gib,
    }


def _open(config: JobConfig, against: ModelConfig | None, root: Path) -> dict[str, Source]:
    """The models by state, in the order in which they are measured."""
    model = open_source(located(config.model, root))
    if against is None:
        return {"model": model}
    dense = open_source(located(against, root))
    if load_tokenizer(dense).get_vocab() != load_tokenizer(model).get_vocab():
        raise ModelError(
            f"--against {dense.name} must have the same tokenizer as {model.name}: other tokens cannot be compared"
        )
    return {"dense": dense, "model": model}

"""Speed of generation as users have it: a folder loaded with transformers alone, greedy, with a key-value cache.

A batch of equally long prompts, one run to warm up, then the mean (method.md, section 6). A job starts it in a fresh
process for the dense and for the pruned folder: `python -m tsp.evaluation.generation_speed FOLDER SETTINGS`, where
SETTINGS is a JSON object; prints one JSON object.
"""

import json
import sys
import time
from typing import Any

import torch

from tsp.config import EvalConfig
from tsp.errors import ConfigError, ModelError
from tsp.evaluation.speed import wait
from tsp.fresh import told_fresh


def check_fits(config: EvalConfig, max_positions: int) -> None:
    """Prompt and new tokens fit into the model's positions, where generation is to be measured.

    Raises:
        ConfigError: they do not.
    """
    asked = config.generation_prompt_tokens + config.generation_new_tokens
    if config.generation_runs and asked > max_positions:
        raise ConfigError(
            "eval.generation_prompt_tokens + eval.generation_new_tokens must be at most the model's "
            f"{max_positions} positions, got {asked}"
        )


def generation_tokens_per_s(model: Any, config: EvalConfig) -> float:
    """New tokens per second, over all sequences of the batch.

    Args:
        model: a whole causal model of transformers, on its device.
        config: batch, prompt, new tokens and runs.
    """
    size = (config.generation_batch, config.generation_prompt_tokens)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompts = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0)).to(model.device)
    mask = torch.ones_like(prompts)
    new = config.generation_new_tokens
    options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(prompts, attention_mask=mask, **options)
        wait(model.device)
        started = time.perf_counter()
        for _ in range(config.generation_runs):
            model.generate(prompts, attention_mask=mask, **options)
        wait(model.device)
    return config.generation_runs * config.generation_batch * new / (time.perf_counter() - started)


def measure_folder(folder: str, config: EvalConfig, device: torch.device, dtype: torch.dtype, *, trust: bool) -> float:
    """The same in a fresh process.

    Args:
        folder: a Hugging Face folder.
        config: batch, prompt, new tokens and runs.
        device: to measure on.
        dtype: of the weights in memory.
        trust: run the folder's own Python code.

    Raises:
        ModelError: it does not load or generate, out of memory for example.
    """
    settings = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "trust": trust}
    # As many threads as this process has: ranks share the cores.
    settings |= {"threads": torch.get_num_threads(), "eval": config.model_dump(mode="json")}
    try:
        return told_fresh("tsp.evaluation.generation_speed", folder, json.dumps(settings))["tokens_per_s"]
    except ChildProcessError as error:
        raise ModelError(f"{folder} does not generate: {error}") from None


def _main(folder: str, text: str) -> None:
    from transformers import AutoModelForCausalLM

    settings = json.loads(text)
    torch.set_num_threads(settings["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, settings["dtype"]), trust_remote_code=settings["trust"]
    )
    speed = generation_tokens_per_s(model.eval().to(settings["device"]), EvalConfig(**settings["eval"]))
    print(json.dumps({"tokens_per_s": speed}))


if __name__ == "__main__":
    _main(*sys.argv[1:])

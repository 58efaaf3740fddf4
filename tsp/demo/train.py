"""Train the embedded demo checkpoint from scratch on the train split of the standard library.

`tsp demo train --output DIR` makes a folder that plain `AutoModelForCausalLM.from_pretrained` loads: a byte-level BPE
tokenizer, a Llama-architecture model in bf16 safetensors, the training curve and a model card with the figures.
Hidden matrices are trained with Muon, the rest with AdamW; the learning rate is a trapezoid (warm-up, plateau, linear
decay). The optimizer state is saved now and then, so a stopped training goes on where it was; a checkpoint folder
without that state is gone on with, too, and the record says where the optimizers started anew.

This is no general trainer: one process, CPU or one GPU.
"""

import itertools
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tsp.demo.card import model_card
from tsp.demo.corpus import stdlib_documents
from tsp.demo.muon import Muon

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# The pre-tokenisation of Llama 3: contractions, words, up to three digits, punctuation, line breaks, blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """Everything that decides the demo checkpoint; the defaults are those of the shipped one."""

    vocab_size: int = 4096
    num_layers: int = 16
    hidden_size: int = 160
    intermediate_size: int = 448
    num_heads: int = 5
    block_tokens: int = 512
    batch_size: int = 16
    total_tokens: int = 6_758_400
    warmup_share: float = 0.0473
    decay_share: float = 0.43
    muon_lr: float = 6e-3
    adam_lr: float = 4e-3
    weight_decay: float = 0.05
    seed: int = 0
    max_modules: int | None = None
    """Of each split; None: all."""


TINY = DemoRecipe(
    vocab_size=512,
    num_layers=2,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    block_tokens=64,
    batch_size=4,
    total_tokens=5120,
    max_modules=8,
)
"""A few seconds' worth, to see the script work."""


def train_demo(recipe: DemoRecipe, output: Path, *, eval_every_steps: int = 150, compile: bool = False) -> dict:
    """Train, or go on training, and write the checkpoint folder.

    Args:
        recipe: shape, optimisation and seed.
        output: folder to write; `state.pt` inside it, if there, is continued from, else a checkpoint.
        eval_every_steps: steps between two held-out evaluations and state saves.
        compile: fuse with `torch.compile`; worth its minute of start-up in a long training only.

    Returns:
        The record that stands in the model card: tokens, seconds, held-out perplexity, machine.
    """
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(recipe.seed)
    tokenizer = _load_or_train_tokenizer(recipe, output)
    stream, held_out = (_token_stream(tokenizer, split, recipe) for split in ("train", "held-out"))
    model = _new_model(recipe, tokenizer).to(device)
    optimizers = _optimizers(model, recipe)
    step_tokens = recipe.batch_size * recipe.block_tokens
    num_steps = math.ceil(recipe.total_tokens / step_tokens)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": [], "optimizer_restarts": []}
    _restore(output, model, optimizers, progress)
    forward: Any = torch.compile(model) if compile else model

    started = time.perf_counter() - progress["seconds"]
    bar = tqdm(range(progress["step"], num_steps), initial=progress["step"], total=num_steps, desc="train demo")
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * _trapezoid(step / num_steps, recipe)
        loss = train_step(forward, optimizers, _batch(stream, step, recipe).to(device))
        bar.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % eval_every_steps == 0 or step + 1 == num_steps:
            seconds = time.perf_counter() - started
            ppl = held_out_perplexity(model, held_out, recipe.block_tokens)
            row = {"tokens": (step + 1) * step_tokens, "seconds": round(seconds), "loss": loss, "held_out_ppl": ppl}
            progress |= {"step": step + 1, "seconds": seconds, "curve": [*progress["curve"], row]}
            bar.write(json.dumps(row))
            _save_state(output / "state.pt", model, optimizers, progress)
    return _write_checkpoint(output, model, recipe, progress, len(stream))


def held_out_perplexity(model: torch.nn.Module, stream: torch.Tensor, block_tokens: int) -> float:
    """exp of the mean cross-entropy over disjoint windows of `block_tokens`; `stream` is `[N]` int64."""
    windows = stream[: len(stream) // block_tokens * block_tokens].view(-1, block_tokens)
    model.eval()
    losses = []
    with torch.no_grad():
        for batch in windows.to(next(model.parameters()).device).split(16):
            losses += [float(model(input_ids=batch, labels=batch).loss)] * len(batch)
    model.train()
    return math.exp(sum(losses) / len(losses))


def _load_or_train_tokenizer(recipe: DemoRecipe, output: Path) -> PreTrainedTokenizerFast:
    if (output / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(output)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_texts("train", recipe), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=recipe.block_tokens
    )
    tokenizer.save_pretrained(output)
    return tokenizer


def _token_stream(tokenizer: PreTrainedTokenizerFast, split: str, recipe: DemoRecipe) -> torch.Tensor:
    texts = _texts(split, recipe)
    return torch.tensor([token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in ids])


def _texts(split: str, recipe: DemoRecipe) -> list[str]:
    return [text for _, text in itertools.islice(stdlib_documents(split), recipe.max_modules)]


def _new_model(recipe: DemoRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=recipe.block_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attention_dropout=0.0,
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    for name, weight in model.named_parameters():
        # Scaled-down outputs of the residual branches (GPT-2, section 2.3), so that depth does not blow up the sum.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.div_(math.sqrt(2 * recipe.num_layers))
    return model


def _optimizers(model: torch.nn.Module, recipe: DemoRecipe) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def _trapezoid(progress: float, recipe: DemoRecipe) -> float:
    return min(1.0, (progress + 1e-4) / recipe.warmup_share, (1.0 - progress) / recipe.decay_share)


def _batch(stream: torch.Tensor, step: int, recipe: DemoRecipe) -> torch.Tensor:
    """Windows `[batch_size, block_tokens]`; each epoch cuts the stream at another offset and in another order."""
    per_epoch = (len(stream) - 1) // recipe.block_tokens - 1
    rows = []
    for sample in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        epoch, position = divmod(sample, per_epoch)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        offset = int(torch.randint(recipe.block_tokens, (1,), generator=generator))
        order = torch.randperm(per_epoch, generator=generator)
        start = offset + int(order[position]) * recipe.block_tokens
        rows.append(stream[start : start + recipe.block_tokens])
    return torch.stack(rows)


def train_step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], batch_BT: torch.Tensor) -> float:
    """One step of all optimizers on tokens `[B, T]` int64, gradient norm at most 1; returns the loss before it."""
    loss = model(input_ids=batch_BT, labels=batch_BT).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _save_state(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], progress: dict) -> None:
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "progress": progress}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _restore(output: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], progress: dict) -> None:
    """Go on from the saved state, or from the weights of a checkpoint with fresh optimizers; else change nothing."""
    if (output / "state.pt").exists():
        state = torch.load(output / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress.update(state["progress"])
    elif (output / "training.json").exists():
        record = json.loads((output / "training.json").read_text())
        model.load_state_dict(LlamaForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict())
        step_tokens = record["recipe"]["batch_size"] * record["recipe"]["block_tokens"]
        restarts = [*record.get("optimizer_restarts", []), record["tokens"]]
        progress.update(
            step=record["tokens"] // step_tokens,
            seconds=record["seconds"],
            curve=record["curve"],
            optimizer_restarts=restarts,
        )


def _write_checkpoint(
    output: Path, model: LlamaForCausalLM, recipe: DemoRecipe, progress: dict, epoch_tokens: int
) -> dict:
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(output)
    last = progress["curve"][-1]
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": last["tokens"],
        "epochs": round(last["tokens"] / epoch_tokens, 2),
        "seconds": last["seconds"],
        "held_out_ppl": round(last["held_out_ppl"], 3),
        "optimizer_restarts": progress["optimizer_restarts"],
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "python": platform.python_version(),
    }
    (output / "training.json").write_text(json.dumps({**record, "curve": progress["curve"]}, indent=1) + "\n")
    (output / "README.md").write_text(model_card(record, progress["curve"]))
    return record

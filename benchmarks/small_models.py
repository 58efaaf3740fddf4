"""Train a small model of any decoder-only architecture of transformers on a text file or folder, for comparisons.

    python benchmarks/small_models.py --architecture gpt_neox --data wiki.train.txt --output build/neox-wiki
    deepspeed launchers/prune.py --ds ds_configs/zero3.json --model build/neox-wiki --data wiki.train.txt ...

The demo model is one architecture and one corpus; what is claimed of a method has to hold on others, too. 80 % of the
documents are trained on: the tenths that `tsp` evaluates and compares settings on, given the same data, are new to the
model. One process, CPU.
"""

import json
import time
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tsp.config import load_config
from tsp.data import load_corpora
from tsp.demo.muon import Muon
from tsp.demo.train import BOS, EOS, held_out_perplexity, train_step
from tsp.documents import documents


@click.command()
@click.option("--architecture", required=True, help="model_type of transformers, e.g. gpt_neox, qwen2, opt.")
@click.option("--data", required=True, help="As --data of tsp prune; two tenths of it are held out.")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--layers", default=12)
@click.option("--width", default=128)
@click.option("--heads", default=4)
@click.option("--vocabulary", default=2048)
@click.option("--block-tokens", default=256)
@click.option("--batch-size", default=16)
@click.option("--epochs", default=6.0)
@click.option("--lr", default=4e-3, help="Of Muon; the other weights have AdamW at half of it.")
@click.option("--seed", default=0)
def main(architecture, data, output, layers, width, heads, vocabulary, block_tokens, batch_size, epochs, lr, seed):
    """Train and save a small model."""
    torch.manual_seed(seed)
    output.mkdir(parents=True)
    tokenizer = train_tokenizer(data, vocabulary, block_tokens)
    tokenizer.save_pretrained(output)
    settings = {"data": {"source": data, "block_tokens": block_tokens, "max_blocks": None, "tuning_blocks": 1}}
    corpora = load_corpora(load_config([settings]), tokenizer, block_tokens)
    model = new_model(architecture, layers, width, heads, block_tokens, tokenizer)
    num_steps = round(epochs * len(corpora.calibration.blocks) / batch_size)
    seconds = train(model, corpora.calibration.blocks, num_steps, batch_size, lr, seed)
    ppl = held_out_perplexity(model, corpora.evals[0].blocks.flatten(), block_tokens)
    model.config.use_cache = True
    model.save_pretrained(output)
    record = {"architecture": architecture, "parameters": model.num_parameters(), "steps": num_steps}
    record |= {"tokens": num_steps * batch_size * block_tokens, "seconds": round(seconds), "held_out_perplexity": ppl}
    (output / "training.json").write_text(json.dumps(record, indent=2))
    click.echo(json.dumps(record))


def train_tokenizer(data, vocabulary, block_tokens):
    """A byte-level BPE of the corpus's own text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((document.text for document in documents(data, None, "train")), trainer)
    start = [(BOS, bpe.token_to_id(BOS))]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=start
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=block_tokens)


def new_model(architecture, layers, width, heads, positions, tokenizer):
    """All settings that are not of size are the architecture's defaults, but for dropout."""
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    shape |= {"intermediate_size": 4 * width, "ffn_dim": 4 * width, "num_key_value_heads": heads}
    shape |= {"word_embed_proj_dim": width, "max_position_embeddings": positions, "vocab_size": len(tokenizer)}
    shape |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0, "tie_word_embeddings": True}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    known = AutoConfig.for_model(architecture).to_dict()
    given = {key: value for key, value in (shape | special).items() if key in known}
    config = AutoConfig.for_model(architecture, **given, use_cache=False)
    return AutoModelForCausalLM.from_config(config)


def train(model, blocks_NT, num_steps, batch_size, lr, seed):
    """Muon for the hidden matrices, AdamW for the rest; short warm-up, linear decay over the last half."""
    named = list(model.named_parameters())
    hidden = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    rest = [weight for name, weight in named if not (weight.ndim == 2 and "embed" not in name)]
    optimizers = [Muon(hidden, lr=lr, weight_decay=0.05), torch.optim.AdamW(rest, lr=lr / 2, weight_decay=0.0)]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(blocks_NT), generator=generator) for _ in range(64)])
    started = time.perf_counter()
    bar = tqdm(range(num_steps))
    for step in bar:
        factor = min(1.0, (step + 1) / (0.05 * num_steps), 2 * (1 - step / num_steps))
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        batch_BT = blocks_NT[order[step * batch_size : (step + 1) * batch_size]]
        loss = train_step(model, optimizers, batch_BT)
        bar.set_postfix(loss=f"{loss:.3f}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

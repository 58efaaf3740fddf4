"""Tiny models, text, configs and engines that the tests share. Nothing is downloaded; everything is seeded."""

import copy
import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsp.config import JobConfig, load_config
from tsp.decoder import Decoder, find_decoder
from tsp.engine import Engine
from tsp.machine import weights_dtype
from tsp.methods.base import Bench
from tsp.sharding import resolve

# Tiny tensors: a second thread costs more than it gives, far more on a busy machine.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]

VOCABULARY = 96
POSITIONS = 64
_HIDDEN = 32

_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_OPT: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "word_embed_proj_dim": _HIDDEN,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GPT2: dict[str, Any] = {"n_embd": _HIDDEN, "n_head": 4, "n_positions": POSITIONS}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

# Family -> config class, fields, name of the field that counts the layers.
_FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE, "num_hidden_layers"),
    "llama-tied": ("LlamaConfig", _LLAMA_LIKE | {"tie_word_embeddings": True}, "num_hidden_layers"),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 8}, "num_hidden_layers"),
    # max_window_layers makes explicit layer_types: the first two full, the others sliding.
    "qwen2": (
        "Qwen2Config",
        _LLAMA_LIKE | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "num_hidden_layers",
    ),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 8}, "num_hidden_layers"),
    "opt": ("OPTConfig", _OPT, "num_hidden_layers"),
    "gpt2": ("GPT2Config", _GPT2, "n_layer"),
    "bloom": ("BloomConfig", {"hidden_size": _HIDDEN, "n_head": 4}, "n_layer"),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": _HIDDEN, "num_heads": 4, "max_position_embeddings": POSITIONS, "window_size": 8},
        "num_layers",
    ),
    "qwen2_moe": ("Qwen2MoeConfig", _LLAMA_LIKE | _MOE | {"decoder_sparse_step": 2}, "num_hidden_layers"),
}


def tiny_config(family: str, num_layers: int = 5, **changes: Any) -> Any:
    """A transformers config of a tiny model."""
    import transformers

    name, fields, count = _FAMILIES[family]
    if family == "gpt_neo":
        fields = fields | {"attention_types": [[["global"], num_layers]]}
    return getattr(transformers, name)(**(_IDS | fields | {count: num_layers} | changes))


def tiny_model(family: str = "llama", num_layers: int = 5, *, seed: int = 0, std: float = 0.25, **changes: Any) -> Any:
    """A frozen random model in fp32 whose layers matter: weights far larger than transformers would start with."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, num_layers, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, std, generator=generator)
        elif name.endswith("bias"):
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def make_identity(decoder: Decoder, *indices: int) -> None:
    """Zero what these Llama layers write to the residual stream."""
    for index in indices:
        decoder.layers[index].self_attn.o_proj.weight.data.zero_()
        decoder.layers[index].mlp.down_proj.weight.data.zero_()


def sample(model: Any, num_blocks: int, block_tokens: int, *, seed: int = 0) -> Tensor:
    """Text `[N, T]` that the model itself wrote, so that no change of its gates helps: its loss is at the minimum."""
    torch.manual_seed(seed)
    start = torch.randint(2, VOCABULARY, (num_blocks, 1))
    written = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        min_new_tokens=block_tokens - 1,
        max_new_tokens=block_tokens - 1,
        pad_token_id=0,
    )
    return written


def tokens(num_blocks: int = 2, block_tokens: int = 12, *, seed: int = 1) -> Tensor:
    """Random tokens `[N, T]`."""
    return torch.randint(2, VOCABULARY, (num_blocks, block_tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens_BT: Tensor) -> Tensor:
    """`[B, T, V]`, without gradient."""
    with torch.no_grad():
        return model(input_ids=tokens_BT, use_cache=False).logits


def distillation_loss(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) at the temperature, times its square, mean over all positions: torch's own."""
    student_NV, teacher_NV = (
        torch.log_softmax(logits.flatten(0, 1).float() / temperature, dim=-1) for logits in (student_BTV, teacher_BTV)
    )
    distance = torch.nn.functional.kl_div(student_NV, teacher_NV, log_target=True, reduction="batchmean")
    return distance * temperature**2


def without_layers(model: Any, dropped: tuple[int, ...], stack: str) -> Any:
    """The same architecture built with fewer layers, the kept weights copied in by hand: an independent reference."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    kept = [index for index in range(text.num_hidden_layers) if index not in dropped]
    for field in ("layer_types",):
        if getattr(text, field, None):
            setattr(text, field, [getattr(text, field)[index] for index in kept])
    if hasattr(text, "attention_types"):
        text.attention_types = [[["global"], len(kept)]]
        text.attention_layers = ["global"] * len(kept)
    text.num_hidden_layers = len(kept)
    smaller = type(model)(config).eval()
    dense = model.state_dict()
    wanted = {}
    for name in smaller.state_dict():
        source = name
        if name.startswith(stack + "."):
            number, rest = name[len(stack) + 1 :].split(".", 1)
            source = f"{stack}.{kept[int(number)]}.{rest}"
        wanted[name] = dense[source]
    smaller.load_state_dict(wanted)
    return smaller


def tiny_tokenizer() -> Any:
    """A tokenizer of one word per id: `w2 w3 ...`; 0 is the start and 1 the end of a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="</s>")


def model_folder(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model and its tokenizer as a Hugging Face folder."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sharded(folder: Path, num_shards: int) -> Path:
    """The same folder with its weights in several files."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = list(weights), {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[number::num_shards]
        save_file({name: weights[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def corpus_file(path: Path, blocks_NT: Tensor) -> Path:
    """Write tokens as a .jsonl corpus, one document a row."""
    rows = (" ".join(f"w{max(token, 2)}" for token in row) for row in blocks_NT.tolist())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def job(**settings: Any) -> JobConfig:
    """A job's config; keys with `__` for the dot: `job(stage1__steps=3)`."""
    from tsp.config import nest

    small: dict[str, Any] = {"train.batch_size": 8, "data.block_tokens": 16, "stage1.steps": 10, "stage2.steps": 10}
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return load_config([nest(key, value) for key, value in (small | given).items()])


def engine(config: JobConfig, stage: int = 0) -> Engine:
    """The engine of this one process; its process group can be made only once and is shared by all tests.

    The launcher's variables that `Engine.start` sets are taken back, as processes that other tests start must not take
    themselves for ranks; only `deepspeed.initialize` insists on LOCAL_RANK.
    """
    if not torch.distributed.is_initialized():
        before = dict(os.environ)
        Engine.start(config, {"zero_optimization": {"stage": 0}})
        for name in set(os.environ) - set(before) - {"LOCAL_RANK"}:
            del os.environ[name]
        torch.set_num_threads(1)
    dtype = weights_dtype(config, torch.device("cpu"))
    content = {"zero_optimization": {"stage": stage}}
    sharding = resolve(content, config, world_size=1, hidden_size=_HIDDEN, dtype=dtype)
    torch.manual_seed(config.seed)
    return Engine(0, 1, torch.device("cpu"), dtype, sharding, config.train)


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def series(self, key: str) -> list[float]:
        return [values[key] for _, values in self.rows if key in values]

    def gates(self, stage: str, num_layers: int) -> Tensor:
        """`[steps, L]`."""
        columns = [self.series(f"{stage}/gate/layer_{index:03d}") for index in range(num_layers)]
        return torch.tensor(columns).T


def bench(model: Any, blocks_NT: Tensor, config: JobConfig, stage: int = 0, protected: tuple[int, ...] = ()) -> Bench:
    """Everything a method needs, on one rank; `bench.model` is for the caller to mount."""
    dense = copy.deepcopy(model)
    return Bench(
        config=config,
        engine=engine(config, stage),
        decoder=find_decoder(model),
        blocks_NT=blocks_NT,
        tracker=Recorder(),
        load_again=lambda: find_decoder(copy.deepcopy(dense)),
        protected=protected,
    )


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

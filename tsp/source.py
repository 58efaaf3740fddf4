"""Find a model and check it before its weights are read: files, structure, tokenizer."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tsp.config import ModelConfig
from tsp.decoder import find_decoder
from tsp.demo import CHECKPOINT as DEMO_CHECKPOINT
from tsp.errors import ModelError


@dataclass(frozen=True)
class Source:
    """A checked model folder, before its weights are read."""

    folder: Path
    name: str
    """As the user gave it."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    config: Any
    """transformers config."""
    dtype: torch.dtype
    """Of the weights on disk; what is saved has it too."""
    stack: str
    """Path of the layer stack."""
    num_outputs: int | None
    """See `Decoder`."""
    num_parameters: int
    """A tied weight counted once."""
    layer_parameters: tuple[int, ...]
    """Of each layer."""

    @property
    def num_layers(self) -> int:
        return self.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def max_positions(self) -> int:
        """The longest sequence that the model was made for; 2048 where its config does not say."""
        return getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048


def open_source(config: ModelConfig) -> Source:
    """Find the model, check its files' headers and its structure (on fake tensors, no weights are read).

    Raises:
        ModelError: missing, damaged, or no decoder-only model.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    name = config.path or "demo"
    folder, revision = _folder(config)
    _check_files(folder)
    if not config.trust_remote_code and "auto_map" in json.loads((folder / "config.json").read_text()):
        raise ModelError(
            f"model {name} brings its own Python code, which would run on this machine; "
            "read it, then allow it with --trust-remote-code"
        )
    try:
        model_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        # Fake tensors have shapes and no data; unlike on the meta device, transformers' masks work on them. In bf16, as
        # torch 2.13 knows the shapes of a mixture of experts (`_grouped_mm`) in no other dtype.
        with FakeTensorMode():
            skeleton = transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config), dtype=torch.bfloat16, trust_remote_code=config.trust_remote_code
            )
            decoder = find_decoder(skeleton)
    except (StrictDataclassError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"model {name} is no causal language model: {one_line(error)}") from None
    dtype = getattr(model_config, "dtype", None) or torch.float32
    return Source(
        folder=folder,
        name=name,
        revision=revision,
        config=model_config,
        dtype=dtype,
        stack=decoder.path,
        num_outputs=decoder.num_outputs,
        num_parameters=_count(skeleton),
        layer_parameters=tuple(map(_count, decoder.layers)),
    )


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer.

    Raises:
        ModelError: the folder has none.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model {source.name} has no usable tokenizer: {one_line(error)}") from None


def _folder(config: ModelConfig) -> tuple[Path, str | None]:
    if config.path is None:
        return DEMO_CHECKPOINT, None
    path = Path(config.path).expanduser()
    if path.is_dir():
        return path.resolve(), None
    if path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") != 1:
        raise ModelError(f"model folder {config.path} does not exist; give a folder, or a hub id like org/name")
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            config.path,
            revision=config.revision,
            ignore_patterns=["*.msgpack", "*.h5", "*.onnx", "*.gguf", "original/*"],
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ModelError(
            f"model {config.path} is no folder here, and not to be had from the hub: {one_line(error)}"
        ) from None
    return Path(snapshot), Path(snapshot).name


def _check_files(folder: Path) -> None:
    """Headers and sizes of all weight files; cheap, and finds truncated and missing shards before anything starts."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json")
    try:
        if not isinstance(json.loads((folder / "config.json").read_text(encoding="utf-8")), dict):
            raise ValueError("config.json must be an object")
        index = folder / "model.safetensors.index.json"
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"model folder {folder}: config.json or the weights' index is damaged: {one_line(error)}"
        ) from None
    shards = {folder / name for name in listed} or set(folder.glob("*.safetensors"))
    for shard in sorted(shards):
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"weight file {shard} is missing or damaged: {one_line(error)}") from None
    if not shards and not any(folder.glob("*.bin")):
        raise ModelError(f"model folder {folder} has no weights (*.safetensors)")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def one_line(error: Exception) -> str:
    """What went wrong, for the end of a message."""
    return " ".join(str(error).split())[:300]

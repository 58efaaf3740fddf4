"""Find a model and check it before its weights are read: files, structure, tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tsp.config import ModelConfig
from tsp.decoder import find_decoder, read_by_others
from tsp.demo import CHECKPOINT as DEMO_CHECKPOINT
from tsp.demo import NAME as DEMO_NAME
from tsp.errors import ModelError
from tsp.masking import one_line
from tsp.safety import check_folder, check_tensors, stored_dtypes
from tsp.skeleton import build_skeleton, cache_fault
from tsp.surgery import (
    Kind,
    check_kinds,
    check_other_shapes,
    kept_layers,
    layer_kinds,
    mended_config,
    other_shapes,
)

# What transformers raises over a config that makes no sense.
_UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Source:
    """A checked model folder, before its weights are read; equal only to itself."""

    folder: Path
    name: str
    """As the user gave it."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    config: Any
    """transformers config, as the folder has it."""
    trust_remote_code: bool
    """Whether Python code that comes with the model may run."""
    text_only: bool
    """The folder holds more than the causal language model that is built from it (an image encoder, say)."""
    dtype: torch.dtype
    """Of the weights on disk; what is saved has it too."""
    other_dtypes: Mapping[str, torch.dtype]
    """Of those that have another one, by the model's names."""
    stack: str
    """Path of the layer stack."""
    num_outputs: int | None
    """See `Decoder`."""
    num_parameters: int
    """A tied weight counted once."""
    layer_parameters: tuple[int, ...]
    """Of each layer."""
    kinds: tuple[Kind, ...]
    """See `surgery.layer_kinds`."""
    other_shapes: Mapping[str, tuple[int, ...]]
    """See `surgery.other_shapes`."""
    read_by_others: frozenset[int]
    """Layers that must stay, see `decoder.read_by_others`."""
    runs_cached: bool
    """Whether its skeleton runs with a key-value cache; then one without some layers has to, too."""

    @property
    def num_layers(self) -> int:
        return self.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def quantized_by(self) -> str | None:
        """Who made its weights smaller, as transformers names them (`torchao`, `fp8`); None: nobody."""
        return (getattr(self.config, "quantization_config", None) or {}).get("quant_method")

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

    name = config.path or DEMO_NAME
    folder, revision = _folder(config)
    contents = check_folder(folder)
    if not config.trust_remote_code and "auto_map" in contents.config:
        raise ModelError(
            f"model {name} brings its own Python code, which would run on this machine; "
            "read it, then allow it with --trust-remote-code"
        )
    try:
        model_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        _check_causal(model_config)
        with FakeTensorMode():
            skeleton = build_skeleton(model_config, trust=config.trust_remote_code)
            _check_one_way(skeleton)
            decoder = find_decoder(skeleton)
            check_tensors(skeleton, contents, getattr(model_config, "dtype", None))
            needed = read_by_others(decoder)
            runs_cached = cache_fault(skeleton) is None
            dtype, other_dtypes = stored_dtypes(skeleton, contents)
    except (StrictDataclassError, ArithmeticError, AssertionError, ImportError, *_UNUSABLE) as error:
        raise ModelError(f"model {name} is no causal language model: {one_line(error)}") from None
    return Source(
        folder=folder,
        name=name,
        revision=revision,
        config=model_config,
        trust_remote_code=config.trust_remote_code,
        text_only=type(skeleton.config) is not type(model_config),
        dtype=dtype or getattr(model_config, "dtype", None) or torch.float32,
        other_dtypes=other_dtypes,
        stack=decoder.path,
        num_outputs=decoder.num_outputs,
        num_parameters=_count(skeleton),
        layer_parameters=tuple(map(_count, decoder.layers)),
        kinds=tuple(layer_kinds(decoder.layers)),
        other_shapes=other_shapes(skeleton, decoder.path),
        read_by_others=needed,
        runs_cached=runs_cached,
    )


def open_config(config: ModelConfig) -> tuple[str, Any]:
    """Name and transformers config of a model whose weights need not be there; of the hub, `config.json` alone is read.

    Raises:
        ModelError: there is none, or it is that of no causal language model.
    """
    import transformers

    name = config.path or DEMO_NAME
    path = DEMO_CHECKPOINT if config.path is None else Path(config.path).expanduser()
    try:
        found = transformers.AutoConfig.from_pretrained(
            path if path.is_dir() else name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        _check_causal(found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"model {name} has no config of a causal language model: {one_line(error)}") from None
    return name, found


def check_drop(source: Source, dropped: Sequence[int]) -> None:
    """The model without these layers can be described by a config of its family (on fake tensors, in seconds).

    Raises:
        ModelError: it cannot, and why.
    """
    kept = kept_layers(source.num_layers, dropped)
    if source.quantized_by == "torchao":
        raise ModelError(
            f"{source.name} is quantized, each weight in several parts; drop layers of the model it was made from, "
            "then quantize"
        )
    needed = sorted(source.read_by_others.intersection(dropped))
    if needed:
        raise ModelError(
            f"layers {_listed(needed)} of {source.name} cannot go: later layers read their keys and values"
        )
    try:
        with FakeTensorMode():
            smaller = build_skeleton(mended_config(source.config, kept), trust=source.trust_remote_code)
            fault = cache_fault(smaller) if source.runs_cached else None
    except _UNUSABLE as error:
        raise ModelError(f"model {source.name} cannot lose layers {_listed(dropped)}: {one_line(error)}") from None
    layers = smaller.get_submodule(source.stack)
    check_kinds(source.kinds, layer_kinds(layers.children()), kept)
    check_other_shapes(source.other_shapes, other_shapes(smaller, source.stack))
    if fault is not None:
        raise ModelError(f"model {source.name} could not generate without layers {_listed(dropped)}: {fault}")


def load_tokenizer(source: Source) -> Any:
    """The model's own tokenizer.

    Raises:
        ModelError: the folder has none.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # noqa: BLE001  The library tokenizers raises no heir of it.
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


def _check_causal(config: Any) -> None:
    """transformers has a causal language model for the config.

    Raises:
        ValueError: it has none.
    """
    import transformers

    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder")
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not known and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(
            f"transformers {transformers.__version__} has no causal language model for {config.model_type}"
        )


def _check_one_way(skeleton: nn.Module) -> None:
    """No token sees later ones, as far as the model says: some causal ones also leave `is_decoder` at false.

    Raises:
        ValueError: config and attention both say that they do.
    """
    config: Any = skeleton.config
    causal = {module.is_causal for module in skeleton.modules() if isinstance(getattr(module, "is_causal", None), bool)}
    if getattr(config, "is_decoder", True) is False and causal == {False}:
        raise ValueError(f"its config says is_decoder: false, so each token of {config.model_type} sees the later ones")


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

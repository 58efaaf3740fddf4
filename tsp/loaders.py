"""What other programs read of a checkpoint folder: vLLM, and llama.cpp's converter to GGUF.

Neither is run here. vLLM takes the folder by its `config.json` and tensor names, the converter by the names that the
package `gguf` knows; so a stale count, a list per layer of another length, a gap in the layers' numbers or a tensor
without a place is found before a server meets it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from tsp.drop import layer_numbers, tensor_names
from tsp.errors import ConfigError
from tsp.safety import weight_files
from tsp.source import Source

# Where loaders look for the number of layers, in the order of llama.cpp's converter.
_COUNTS = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")
# Lists with one entry per layer, by the names that they have in configs.
_PER_LAYER = re.compile(r".*layer_types|layers_block_type|attention_layers|no_rope_layers|block_types")
_SUFFIXES = (".weight", ".bias")


def check_loader(loader: str, source: Source) -> Iterator[str]:
    """The faults that a loader would stumble over, a sentence each.

    Args:
        loader: a key of `LOADERS`.
        source: from `open_source`.

    Raises:
        ConfigError: unknown loader, or its package is missing.
    """
    if loader not in LOADERS:
        raise ConfigError(f"--for must be of {', '.join(LOADERS)}, got {loader!r}")
    yield from _common(source)
    yield from LOADERS[loader](source)


def _common(source: Source) -> Iterator[str]:
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    text = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)
    numbers = layer_numbers(source)
    if numbers != list(range(len(numbers))):
        yield f"the layers' numbers have gaps: {numbers}"
    counts = {name: text[name] for name in _COUNTS if name in text}
    if set(counts.values()) != {len(numbers)}:
        yield f"config.json must count {len(numbers)} layers, it says {counts or 'nothing'}"
    for name, value in text.items():
        if _PER_LAYER.fullmatch(name) and isinstance(value, list) and len(value) != len(numbers):
            yield f"config.json: {name} has {len(value)} entries for {len(numbers)} layers"
    files = [path.name for path in weight_files(source.folder)]
    if not all(name.endswith(".safetensors") for name in files):
        yield f"the weights must be safetensors, got {', '.join(files)}"
    if not any((source.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        yield "there is no tokenizer.json, tokenizer.model or vocab.json"


def _vllm(source: Source) -> Iterator[str]:
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    if len(config.get("architectures") or []) != 1:
        yield f"config.json must name one architecture, got {config.get('architectures')}"


def places_in_gguf(architecture: Any, num_layers: int) -> Any:
    """The `gguf.TensorNameMap` of an architecture, whichever were asked for before."""
    import gguf

    class Places(gguf.TensorNameMap):
        # gguf 0.19.0 writes an architecture's names into the table that all of them share.
        block_mappings_cfg: ClassVar[dict[Any, Any]] = dict(gguf.TensorNameMap.block_mappings_cfg)

    return Places(architecture, num_layers)


def _gguf(source: Source) -> Iterator[str]:
    try:
        import gguf
    except ImportError:
        raise ConfigError("--for gguf needs the package gguf: pip install gguf") from None
    names = [name for path in weight_files(source.folder) for name in tensor_names(path)]
    count = source.num_layers
    misfits = {
        architecture: [name for name in names if places.get_name(name, try_suffixes=_SUFFIXES) is None]
        for architecture in gguf.MODEL_ARCH
        if (places := places_in_gguf(architecture, count))
    }
    nearest = min(misfits, key=lambda architecture: len(misfits[architecture]))
    if misfits[nearest]:
        label: Any = gguf.MODEL_ARCH_NAMES[nearest]
        yield (
            f"no architecture of gguf has a place for every tensor; {label} lacks {len(misfits[nearest])}, "
            f"first {misfits[nearest][0]}"
        )


LOADERS: Mapping[str, Callable[[Source], Iterator[str]]] = {"vllm": _vllm, "gguf": _gguf}

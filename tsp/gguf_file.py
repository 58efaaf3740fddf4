"""A Hugging Face folder as one GGUF file, for llama.cpp and what is built on it.

The package gguf knows the names of tensors, transformers' own reader which key holds which setting and how rows are
stored. What follows is that reader the other way round, and in the end the file is read by it: only one that gives the
same weights and the same predictions is kept. Vocabulary: `gguf_vocabulary.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tsp.errors import ConfigError
from tsp.gguf_vocabulary import add_vocabulary, cannot_hold
from tsp.loaders import places_in_gguf
from tsp.masking import one_line
from tsp.progress import phase
from tsp.safety import weight_files

_SUFFIXES = (".weight", ".bias")
_PROBE_TOKENS = 64


def require_gguf() -> Any:
    """The package `gguf`.

    Raises:
        ConfigError: it is missing.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError("--format gguf needs the package gguf: pip install 'tsp[gguf]'") from None
    return gguf


def write_gguf(folder: Path, path: Path) -> None:
    """Write the file, in the precision of the folder's weights; vectors are float32, as llama.cpp wants them.

    Args:
        folder: Hugging Face folder with a `tokenizer.json`.
        path: file to make, in a folder of its own.

    Raises:
        ConfigError: the package gguf is missing.
        ModelError: no GGUF that transformers reads can hold this model, or it would not be the same model.
    """
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    gguf = require_gguf()
    config = AutoConfig.from_pretrained(folder)
    architecture = _architecture(gguf, config)
    writer = gguf.GGUFWriter(path, config.model_type)
    try:
        writer.add_type("model")
        _add_settings(writer, config)
        add_vocabulary(gguf, writer, folder, config.vocab_size)
        processor = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)(config=config.to_dict())
        _add_tensors(gguf, writer, folder, places_in_gguf(architecture, config.num_hidden_layers), processor, config)
    finally:
        writer.close()
    _prove(folder, path)


def _architecture(gguf: Any, config: Any) -> Any:
    from transformers.integrations import GGUF_CONFIG_MAPPING

    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items() if name in GGUF_CONFIG_MAPPING}
    if config.model_type not in known:
        raise cannot_hold(f"a model of type {config.model_type}")
    return known[config.model_type]


def _add_settings(writer: Any, config: Any) -> None:
    """What transformers' reader makes the config of."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise cannot_hold(f"rope_type {rope['rope_type']!r}")
    values = {"rope_theta": rope.get("rope_theta")} | config.to_dict()
    for key, name in GGUF_CONFIG_MAPPING[config.model_type].items():
        value = values.get(name)
        if value is not None:
            add: Callable[[str, Any], None] = {
                bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                str: writer.add_string, list: writer.add_array,
            }[type(value)]  # fmt: skip
            add(f"{config.model_type}.{key}", value)


def _add_tensors(gguf: Any, writer: Any, folder: Path, places: Any, processor: Any, config: Any) -> None:
    """One tensor after the other: at no time are all of them in memory."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    names: dict[str, str] = {}
    for name, tensor in _tensors(folder):
        place = places.get_name(name, try_suffixes=_SUFFIXES)
        if tensor.dtype not in kinds or place is None:
            raise cannot_hold(f"{name} ({tensor.dtype})")
        if place == "output.weight" and config.tie_word_embeddings:
            continue
        kind = "F32" if tensor.dim() == 1 else kinds[tensor.dtype]
        itemsize = 4 if kind == "F32" else 2
        raw = getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor_info(place, tuple(tensor.shape), np.dtype("f4"), tensor.numel() * itemsize, raw)
        names[name] = place
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in phase(_tensors(folder), "gguf", len(names)):
        if name in names:
            stored = _before_reading(tensor, names[name], processor)
            writer.write_tensor_data((stored.float() if stored.dim() == 1 else stored).view(torch.uint8).numpy())


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                yield name, file.get_tensor(name)


def _before_reading(tensor: Tensor, place: str, processor: Any) -> Tensor:
    """What must be stored for transformers' reader to give the tensor: it moves rows, or adds to a vector.

    Raises:
        ModelError: it does something else.
    """
    rows = np.arange(len(tensor)).reshape(-1, *[1] * (tensor.dim() - 1))
    try:
        read = processor.process(rows, place).weights.reshape(-1)
        shift = read - rows.reshape(-1)
        if (shift == shift[0]).all():
            return tensor if shift[0] == 0 else tensor.float() - int(shift[0])
        if (np.sort(read) == rows.reshape(-1)).all():
            return tensor[torch.from_numpy(np.argsort(read))]
    except (AttributeError, TypeError, ValueError):
        pass
    raise cannot_hold(f"{place}, which transformers would read otherwise")


def _prove(folder: Path, path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dtype = next(tensor.dtype for _, tensor in _tensors(folder))
    try:
        with _quiet():
            wanted: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            found: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise cannot_hold(f"this model, transformers does not read it ({one_line(error)})") from None
    weights = found.state_dict()
    lost = [name for name, value in wanted.state_dict().items() if not _same(value, weights.get(name))]
    if lost:
        raise cannot_hold(f"{lost[0]}, which is read otherwise")
    tokens_BT = torch.randint(wanted.config.vocab_size, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.equal(wanted(tokens_BT).logits, found(tokens_BT).logits):
            raise cannot_hold("all settings of this model's config.json: what is read predicts otherwise")


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers finds wrong is in our error, in a line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _same(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(value, other)

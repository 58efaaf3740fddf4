"""Is a model folder what it says it is? Looked at before anything in it is used, as it may come from anybody.

    contents = check_folder(folder)               # links, config.json, the index and the headers of the weights
    check_tensors(skeleton, contents, dtype)      # each tensor's shape and dtype, against the model of the config

Only headers are read. Whether Python code that comes with a model may run is decided elsewhere.
"""

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.errors import ModelError
from tsp.shards import read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAX_JSON_BYTES = 100 * 2**20
_MAX_COUNT = 100_000
"""Of experts and labels: transformers makes lists of them."""
# Ends of names; `.model`, `.tiktoken` and `.bpe` are of tokenizers.
_KNOWN = (".safetensors", ".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", ".bpe")
# The file that transformers looks for first, of the kind that it prefers and of the other.
_WHOLE = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
_FLOATS = {"torch.float64": "F64", "torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


@dataclass(frozen=True)
class Contents:
    """What a folder holds, as far as it was looked at."""

    config: dict[str, Any]
    """`config.json`."""
    tensors: dict[str, dict[str, Any]]
    """`dtype` and `shape` by name, as safetensors spells them; empty for `.bin` files, which are not unpickled here."""


def check_folder(folder: Path) -> Contents:
    """Look at all files that decide what is loaded; in the time and memory that their headers take.

    Raises:
        ModelError: one is missing, damaged, outside of the folder, or at odds with another.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json")
    _check_links(folder)
    config = _read_object(folder / "config.json")
    files = weight_files(folder)
    _check_nothing_else_is_loaded(folder, config, files)
    if files[0].suffix == ".safetensors":
        stored = {file: _tensors_of(file) for file in files}
        for index in _indexes(folder, ".safetensors"):
            _check_index(index, stored)
        tensors = {name: entry for found in stored.values() for name, entry in found.items()}
        num_tensors = len(tensors)
    else:
        tensors, num_tensors = {}, sum(map(_num_in_archive, files))
    _check_counts(config, num_tensors)
    return Contents(config, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder from which transformers would read its weights, in order; safetensors before `.bin`.

    Raises:
        ModelError: there are none, or an index that names them is damaged.
    """
    for kind, whole in _WHOLE.items():
        if (folder / whole).is_file():
            return [folder / whole]
        listed = {folder / name for index in _indexes(folder, kind) for name in _weight_map(index).values()}
        found = listed or set(folder.glob(f"*{kind}"))
        if found:
            return sorted(found)
    raise ModelError(f"model folder {folder} has no weights (*.safetensors)")


def known_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are handed on and registered: of kinds that hold data or text, never a pickle.

    Python code is among them only where the model's or the tokenizer's config names it: such a model has been opened
    with leave to run it, and is no model without it.

    Raises:
        ModelError: a file is called safetensors and looks like a pickle.
    """
    configs = (folder / "config.json", folder / "tokenizer_config.json")
    code = (".py",) if any("auto_map" in _read_object(path) for path in configs if path.is_file()) else ()
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and (path.name.endswith((*_KNOWN, *code)) or path.name in ("LICENSE", "NOTICE"))
        and not _is_pickled(path)
    )


def check_tensors(skeleton: Any, contents: Contents, dtype: "torch.dtype | None") -> None:
    """The weights on disk are of the shapes and dtypes that the config asks for.

    A name that the model does not know is let pass: loading decides what becomes of it. So is what a quantized model
    holds in packed numbers, each kind in its own way. F32 is allowed beside any dtype, as many models keep a few
    tensors in it; and so is the dtype that most numbers have, as configs often name another.

    Args:
        skeleton: the model of the config on fake tensors; called under its `FakeTensorMode`.
        contents: from `check_folder`.
        dtype: as the config says; None: it does not.

    Raises:
        ModelError: a tensor is not, and which.
    """
    quantized = _is_quantized(contents)
    expected = _expected(skeleton, contents.tensors)
    allowed = {"F32", _FLOATS.get(str(dtype), "F32"), *filter(None, [_most(contents)])}
    for name, entry in contents.tensors.items():
        tensor = expected.get(name)
        if tensor is None or (quantized and entry["dtype"] not in _FLOATS.values()):
            continue
        if entry["shape"] != list(tensor.shape):
            raise ModelError(
                f"tensor {name} must be of shape {list(tensor.shape)} by config.json, got {entry['shape']}"
            )
        if tensor.is_floating_point() and entry["dtype"] not in allowed and not quantized:
            raise ModelError(f"tensor {name} must be of dtype {' or '.join(sorted(allowed))}, got {entry['dtype']}")


def stored_dtypes(skeleton: Any, contents: Contents) -> "tuple[torch.dtype | None, dict[str, torch.dtype]]":
    """What the weights on disk are in, whatever the config says, and which of the model's tensors are in another dtype.

    Args:
        skeleton: as for `check_tensors`.
        contents: from `check_folder`.

    Returns:
        None and nothing for `.bin` files, and for a quantized model.
    """
    import torch

    names = {kind: getattr(torch, name.removeprefix("torch.")) for name, kind in _FLOATS.items()}
    stored = {name: entry["dtype"] for name, entry in contents.tensors.items() if entry["dtype"] in names}
    most = _most(contents)
    if most is None or _is_quantized(contents):
        return None, {}
    own, prefix = skeleton.state_dict().keys(), f"{skeleton.base_model_prefix}."
    others = {name if name in own else prefix + name: names[kind] for name, kind in stored.items() if kind != most}
    return names[most], others


def _most(contents: Contents) -> str | None:
    """The floating-point dtype that most of the numbers are in: norms and biases are many tensors, and small ones."""
    numbers: Counter[str] = Counter()
    for entry in contents.tensors.values():
        if entry["dtype"] in _FLOATS.values():
            numbers[entry["dtype"]] += math.prod(entry["shape"])
    return numbers.most_common(1)[0][0] if numbers else None


def _is_quantized(contents: Contents) -> bool:
    return bool({"quantization_config", "compression_config"} & contents.config.keys())


def _is_pickled(path: Path) -> bool:
    """Whether a file is a pickle under another name, or an archive, which may hold some."""
    with path.open("rb") as file:
        if not file.read(4).startswith((b"\x80", b"PK\x03\x04", b"\x1f\x8b")):
            return False
    if path.suffix == ".safetensors":
        # Which begins with the length of its header, and so with any bytes.
        _tensors_of(path)
        return False
    return True


def _check_links(folder: Path) -> None:
    """No file is a link to one elsewhere; in the Hugging Face cache all are links, to blobs of the same model."""
    folder = folder.resolve()
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    root = folder.parent.parent if in_cache else folder
    for path in folder.iterdir():
        try:
            inside = path.is_dir() or path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # It leads to itself.
            inside = False
        if not inside:
            raise ModelError(f"{path} is a link out of the model's folder; copy the file there if it belongs to it")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES // 2**20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is missing or damaged: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def _indexes(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*{kind}.index.json"))


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor. A file is called by its bare name: it lies beside the index, and nowhere else."""
    content = _read_object(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{index} is damaged: weight_map must name a file for each tensor")
    kind = index.name.removesuffix(".index.json").rpartition(".")[2]
    for tensor, file in content.items():
        if not isinstance(file, str) or not re.fullmatch(rf"[^/\\\x00]+\.{kind}", file):
            raise ModelError(f"{index} must name files like model-00001-of-00002.{kind}, got {file!r} for {tensor}")
    return content


def _check_nothing_else_is_loaded(folder: Path, config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """transformers reads other weights than these where a folder tells it to."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"model folder {folder} holds an adapter of another model; merge the two and save the result")
    named = config.get("transformers_weights")
    if named is not None and str(named) not in {path.name for path in (*files, *_indexes(folder, ".safetensors"))}:
        raise ModelError(
            f"config.json: transformers_weights must be the file that is there, got {named!r}; leave it out"
        )


def _tensors_of(file: Path) -> dict[str, dict[str, Any]]:
    try:
        if not file.is_file():
            raise ValueError("there is no such file")
        return read_header(file).tensors
    except (ValueError, OSError) as error:
        raise _damaged(file, error) from None


def _num_in_archive(file: Path) -> int:
    """How many tensors a `.bin` file holds; it is not unpickled for that."""
    try:
        with zipfile.ZipFile(file) as archive:
            return sum("/data/" in name for name in archive.namelist())
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(f"weight file {file} is missing or damaged: {' '.join(str(error).split())[:200]}")


def _check_index(index: Path, stored: Mapping[Path, Mapping[str, Any]]) -> None:
    """The index says just what its files hold."""
    listed = set(_weight_map(index).items())
    names = {name for _, name in listed}
    if not names <= {file.name for file in stored}:
        return  # All is in one file beside, and the index is not read.
    there = {(tensor, file.name) for file, tensors in stored.items() if file.name in names for tensor in tensors}
    for tensor, name in sorted(listed ^ there)[:1]:
        fault = "is not in it" if (tensor, name) in listed else "is in it and not in the index"
        raise ModelError(f"{index} and {name} are at odds: tensor {tensor} {fault}")


def _check_counts(config: Mapping[str, Any], num_tensors: int) -> None:
    """What is built for each of a number comes to its end; a layer has a tensor at least."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, num_tensors)
        counted = re.fullmatch(r"(?:num|n)_(?:\w+_)?(layers?|experts|labels)", key)
        if counted and isinstance(value, int | float):
            most = num_tensors if counted[1].startswith("layer") else _MAX_COUNT
            if value > most:
                raise ModelError(f"config.json: {key} must be at most {most} with {num_tensors} tensors, got {value:g}")


def _expected(skeleton: Any, stored: Mapping[str, Any]) -> "dict[str, Tensor]":
    """The model's tensors by the names that they have on disk."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = dict(skeleton.state_dict(keep_vars=True))
    if not stored.keys() <= tensors.keys():
        # Some families are held otherwise in memory, experts in one tensor say; some files leave the base's name out.
        tensors = revert_weight_conversion(skeleton, tensors)
        prefix = f"{skeleton.base_model_prefix}."
        tensors |= {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors

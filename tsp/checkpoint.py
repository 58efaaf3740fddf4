"""Load a model in shards, save it without the dropped layers, prove the result.

A folder is written beside its final place and renamed, so it appears whole or not at all.
"""

import copy
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsp.decoder import Decoder
from tsp.errors import ModelError, StorageError
from tsp.files import sync
from tsp.fresh import told_fresh
from tsp.masking import one_line
from tsp.progress import phase
from tsp.safety import known_files
from tsp.source import Source
from tsp.surgery import kept_layers, mended_config, renamed

# Gathers sharded parameters for the length of a block: `engine.Engine.gathered`.
Gather = Callable[..., AbstractContextManager[None]]

_MAX_SHARD_BYTES = 2 * 2**30
# Ends of the names of files that hold weights, or say where they are.
_WEIGHTS = (".safetensors", ".index.json")
# Largest difference of a logit, reloaded against in memory, that is rounding; other kernels may add in another order.
_LOGIT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def load(source: Source, dtype: torch.dtype, loading: AbstractContextManager[None]) -> Decoder:
    """Read the weights, frozen.

    Args:
        source: from `open_source`.
        dtype: of the weights in memory.
        loading: `engine.Engine.loading()`, under which the weights go straight into shards.

    Raises:
        ModelError: tensors are missing or of another shape than the config says.
    """
    import transformers
    from safetensors import SafetensorError

    config = copy.deepcopy(source.config)
    # Dropout is off in every phase: we measure and move what the model knows, on few tokens.
    for part in (config, config.get_text_config(decoder=True)):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    try:
        with loading:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if getattr(error, "errno", None) not in (None, errno.ENOENT):
            raise StorageError(f"model {source.name} cannot be read: {one_line(error)}") from error
        # No room in memory, or another rank that is gone, is not the model's fault.
        others = (torch.OutOfMemoryError, torch.distributed.DistError)
        if isinstance(error, others) or "can't allocate memory" in str(error):
            raise
        raise ModelError(f"model {source.name} cannot be loaded: {one_line(error)}") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ModelError(f"model {source.name} lacks {len(faults)} tensors that its config asks for, first {faults[0]}")
    return Decoder(model.requires_grad_(False), source.stack, source.num_outputs)


def round_weights(parameters: Iterable[Tensor], dtype: torch.dtype, gathered: Gather) -> None:
    """Round trained weights to the dtype they will be saved in, so that what is evaluated is what is saved."""
    for parameter in parameters:
        if parameter.dtype != dtype:
            with gathered([parameter], modify=True):
                parameter.data.copy_(parameter.data.to(dtype))


def save_without(
    decoder: Decoder, source: Source, dropped: Sequence[int], output: Path, *, gathered: Gather, write: bool
) -> None:
    """Write the model without some layers as a plain Hugging Face folder, shard by shard.

    Every rank calls this; at most one shard is whole in memory, and only on the rank that writes.

    Args:
        decoder: the model, in the original numbering.
        source: where it came from; gives config, dtypes on disk and tokenizer.
        dropped: indices that go.
        output: folder to make; must not exist.
        gathered: `engine.Engine.gathered`.
        write: True on rank 0.
    """
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    kept = kept_layers(source.num_layers, dropped)
    config = _config(decoder.model, source, kept)
    tensors = _named_tensors(decoder.model, source.stack, kept)
    dtypes = {renamed(name, source.stack, kept): dtype for name, dtype in source.other_dtypes.items()}
    shards = _shards(tensors, source)
    with whole_or_not_at_all(output) if write else nullcontext(output) as folder:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(phase(shards, "save", len(shards), show=write), start=1):
            shard = {}
            for name in names:
                with gathered([tensors[name]]):
                    if write:
                        shard[name] = _on_disk(tensors[name], dtypes.get(name, source.dtype))
            if write:
                # Some families are held otherwise in memory (experts in one tensor): the file is to be as it was.
                shard = {
                    name: data.contiguous() for name, data in revert_weight_conversion(decoder.model, shard).items()
                }
                file = shard_name(number, len(shards))
                save_file(shard, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(shard, file)
        if not write:
            return
        write_index(folder, weight_map)
        copy_companions(source.folder, folder)
        config.save_pretrained(folder)


def copy_companions(dense: Path, folder: Path) -> None:
    """Copy what lies beside the weights: tokenizer, generation config, Python code; no config, no model card."""
    for path in known_files(dense):
        if not path.name.endswith(_WEIGHTS) and path.name not in ("config.json", "README.md"):
            shutil.copy(path, folder)


def shard_name(number: int, num_shards: int) -> str:
    """The file of a shard, numbered from 1, as transformers names it."""
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors" if num_shards > 1 else "model.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Say in which file each tensor is, where there are several."""
    files = set(weight_map.values())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum((folder / file).stat().st_size for file in files)},
            "weight_map": dict(weight_map),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def prove(pruned: Source, tokens_BT: Tensor, logits_BTV: Tensor | None) -> dict[str, Any]:
    """Reload a checkpoint in a fresh process with transformers alone and compare.

    Args:
        pruned: the checkpoint, from `open_source`.
        tokens_BT: `[B, T]` int64.
        logits_BTV: `[B, T, V]`, what the model with bypassed layers gave; None: only that there are finite ones.

    Returns:
        What `python -m tsp.proof` prints: `max_logit_difference`, `cached_equals_uncached`, `missing`, `unexpected`;
        and `faults`, a sentence each.

    Raises:
        ModelError: it does not load.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.safetensors"
        expected = {} if logits_BTV is None else {"logits": logits_BTV.cpu().contiguous()}
        code = ["--trust-remote-code"] * pruned.trust_remote_code
        save_file({"tokens": tokens_BT.cpu().contiguous(), **expected}, probe)
        try:
            proof = told_fresh("tsp.proof", str(pruned.folder), str(probe), *code)
        except ChildProcessError as error:
            raise ModelError(f"the pruned checkpoint {pruned.folder} does not load: {error}") from None
    if pruned.text_only:
        proof["unexpected"] = []  # What is beside the text is there, and is not loaded.
    return proof | {"faults": _faults(proof, torch.float32 if logits_BTV is None else logits_BTV.dtype)}


def _faults(proof: dict[str, Any], dtype: torch.dtype) -> list[str]:
    faults = [
        f"{len(proof[kind])} tensors are {kind}, first {proof[kind][0]}"
        for kind in ("missing", "unexpected")
        if proof[kind]
    ]
    # Not a number compares as False.
    if not proof["max_logit_difference"] <= _LOGIT_TOLERANCE[dtype]:
        faults.append(f"a logit differs by {proof['max_logit_difference']:g}, allowed is {_LOGIT_TOLERANCE[dtype]:g}")
    if not proof["cached_equals_uncached"]:
        faults.append("it generates otherwise with a key-value cache than without")
    return faults


@contextmanager
def whole_or_not_at_all(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` when the block ends, synced, and is removed when it fails."""
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _let_others_read(temporary)
        # A name that is on the disk before its content would look done after a power cut.
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        os.replace(temporary, output)
        sync(output.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _let_others_read(folder: Path) -> None:
    """As far as the user's mask has it: safetensors writes for its owner alone, and others may serve the model."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        # A link of a registered file has the mode that it has been given there.
        if path.is_file() and path.stat().st_nlink == 1:
            path.chmod(0o666 & ~mask)


def _named_tensors(model: nn.Module, stack: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """What the checkpoint will hold, by new name; a tied tensor once, under its first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        new_name = renamed(name, stack, kept)
        if new_name is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[new_name] = tensor
    return tensors


def _config(model: nn.Module, source: Source, kept: Sequence[int]) -> Any:
    """Of what is saved: the language model alone, where that is all that was loaded."""
    if not source.text_only:
        return mended_config(source.config, kept)
    config: Any = mended_config(source.config.get_text_config(decoder=True), kept)
    config.architectures, config.dtype = [type(model).__name__], source.dtype
    return config


def _shards(tensors: Mapping[str, Tensor], source: Source) -> list[list[str]]:
    """Names by shard; the tensors of a layer stay together, since some are made of several others."""
    units: dict[str, list[str]] = {}
    for name in tensors:
        number = name.removeprefix(f"{source.stack}.").partition(".")[0]
        units.setdefault(number if name.startswith(f"{source.stack}.") else name, []).append(name)
    shards: list[list[str]] = [[]]
    size = 0
    for names in units.values():
        unit_bytes = sum(_numel(tensors[name]) for name in names) * source.dtype.itemsize
        if shards[-1] and size + unit_bytes > _MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1] += names
        size += unit_bytes
    return shards


def _numel(tensor: Tensor) -> int:
    return tensor.ds_numel if hasattr(tensor, "ds_numel") else tensor.numel()


def _on_disk(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    data = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return data.contiguous()

"""Drop layers from a checkpoint folder on disk, shard by shard: no model is built, no weights are interpreted.

drop_layers(open_source(config.model), [3, 7, 9], Path("smaller"))
"""

import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tsp.checkpoint import require_new, shard_name, whole_or_not_at_all, write_index
from tsp.config import ModelConfig
from tsp.errors import ConfigError, ModelError
from tsp.progress import phase
from tsp.shards import copy_tensors, read_header
from tsp.source import Source, check_drop, open_source, weight_files
from tsp.surgery import kept_layers, mended_config, renamed
from tsp.tracking.registry import located

log = logging.getLogger("tsp")

_WRITTEN_ANEW = (".safetensors", ".bin", ".index.json")


def drop_layers(source: Source, dropped: Sequence[int], output: Path, *, trust: bool = False) -> Path:
    """Write a folder like the source's, without some layers.

    Args:
        source: from `open_source`.
        dropped: indices that go.
        output: folder to make; must be new or empty.
        trust: run the model's own Python code, to check the result's structure.

    Returns:
        `output`.

    Raises:
        ModelError: these layers cannot go, or the tensors' names do not fit the model's structure.
    """
    kept = kept_layers(source.num_layers, dropped)
    check_drop(source, dropped, trust=trust)
    config = mended_config(source.config, kept)
    files = weight_files(source.folder)
    names = {path: list(tensor_names(path)) for path in files}
    stack = _stack_on_disk([name for listed in names.values() for name in listed], source)
    new_names = {path: dict(_renamed(listed, stack, kept, source.num_layers)) for path, listed in names.items()}
    remaining = [path for path in files if new_names[path]]
    with whole_or_not_at_all(output) as folder:
        weight_map: dict[str, str] = {}
        for number, path in enumerate(phase(remaining, "drop", len(remaining)), start=1):
            target = shard_name(number, len(remaining))
            _copy(path, folder / target, new_names[path])
            weight_map |= dict.fromkeys(new_names[path].values(), target)
        write_index(folder, weight_map)
        for path in source.folder.iterdir():
            # A model card would tell of the dense model.
            if (
                path.is_file()
                and not path.name.endswith(_WRITTEN_ANEW)
                and path.name not in ("config.json", "README.md")
            ):
                shutil.copy(path, folder)
        config.save_pretrained(folder)
    return output


def drop_to(model: str, dropped: Sequence[int], output: Path, *, root: Path, trust: bool = False) -> Path:
    """`drop_layers` for a folder, hub id or `models:/...`.

    Raises:
        TspError: with exit code 2; nothing has been written.
    """
    require_new(output)
    source = open_source(located(ModelConfig(path=model, trust_remote_code=trust), root))
    try:
        return drop_layers(source, dropped, output, trust=trust)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from None


def layer_numbers(source: Source) -> list[int]:
    """The numbers of the layers that a folder's tensors name, ascending."""
    names = [name for path in weight_files(source.folder) for name in tensor_names(path)]
    prefix = _stack_on_disk(names, source, at_least=1) + "."
    return sorted({int(name[len(prefix) :].partition(".")[0]) for name in names if name.startswith(prefix)})


def _stack_on_disk(names: Iterable[str], source: Source, *, at_least: int | None = None) -> str:
    """The stack's path as the files have it: the model's own, or one without the name of the base model before it.

    Raises:
        ModelError: none, or several.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            numbers.setdefault(name[: match.start()], set()).add(int(match[1]))
    parts = source.stack.split(".")
    paths = [".".join(parts[start:]) for start in range(len(parts))]
    wanted = set(range(source.num_layers if at_least is None else at_least))
    found = [path for path in paths if numbers.get(path, set()) >= wanted]
    if len(found) != 1:
        raise ModelError(
            f"the weights of {source.name} must name the layers 0 to {source.num_layers - 1} under {source.stack}, "
            f"found {', '.join(found) or 'none'}"
        )
    return found[0]


def _renamed(names: Iterable[str], stack: str, kept: Sequence[int], num_layers: int) -> Iterable[tuple[str, str]]:
    """Old and new names of what remains. Layers beyond the stack (to predict further tokens) go: nothing loads them."""
    beyond = re.compile(rf"{re.escape(stack)}\.(\d+)\.")
    surplus = set()
    for name in names:
        match = beyond.match(name)
        if match and int(match[1]) >= num_layers:
            surplus.add(int(match[1]))
            continue
        new = renamed(name, stack, kept)
        if new is not None:
            yield name, new
    if surplus:
        log.warning("layers %s are beyond the stack of %d; they are left out", sorted(surplus), num_layers)


def tensor_names(path: Path) -> Iterable[str]:
    """The tensors of one weight file.

    Raises:
        ModelError: it is damaged.
    """
    if path.suffix == ".safetensors":
        try:
            return read_header(path).tensors
        except (ValueError, KeyError) as error:
            raise ModelError(f"weight file {path} is damaged: {error}") from None
    return _load_pickle(path)


def _copy(source: Path, target: Path, new_names: Mapping[str, str]) -> None:
    if source.suffix == ".safetensors":
        copy_tensors(source, target, new_names)
        return
    from safetensors.torch import save_file

    tensors = _load_pickle(source)
    # Cloned: a file of that kind may hold one tensor under two names, which safetensors does not allow.
    save_file({new: tensors[old].clone().contiguous() for old, new in new_names.items()}, target, {"format": "pt"})


def _load_pickle(path: Path) -> dict:
    """A `.bin` file by torch's safe loader, which runs no code that comes with it; mapped, not read."""
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(f"weight file {path} cannot be read safely: {' '.join(str(error).split())[:200]}") from None

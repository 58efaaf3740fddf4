"""Drop layers from a checkpoint folder on disk, shard by shard: no model is built, no weights are interpreted.

drop_layers(open_source(config.model), [3, 7, 9], Path("smaller"))
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tsp.checkpoint import copy_companions, shard_name, whole_or_not_at_all, write_index
from tsp.config import ModelConfig
from tsp.errors import ConfigError, ModelError
from tsp.files import require_new
from tsp.progress import phase
from tsp.safety import weight_files
from tsp.shards import copy_tensors, read_header
from tsp.source import Source, check_drop, load_tokenizer, open_source
from tsp.surgery import kept_layers, mended_config, renamed
from tsp.tracking.fetch import located

log = logging.getLogger("tsp")


def drop_layers(source: Source, dropped: Sequence[int], output: Path) -> Path:
    """Write a folder like the source's, without some layers.

    Args:
        source: from `open_source`.
        dropped: indices that go.
        output: folder to make; must be new or empty.

    Returns:
        `output`.

    Raises:
        ModelError: these layers cannot go, or the tensors' names do not fit the model's structure.
    """
    kept = kept_layers(source.num_layers, dropped)
    check_drop(source, dropped)
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
        copy_companions(source.folder, folder)
        config.save_pretrained(folder)
    return output


def drop_to(model: str, dropped: Sequence[int], output: Path, *, root: Path, trust: bool = False) -> Path:
    """`drop_layers` for a folder, hub id or `models:/...`.

    Raises:
        TspError: with exit code 2; nothing has been written.
    """
    require_new(output, at_once=True)
    source = open_source(located(ModelConfig(path=model, trust_remote_code=trust), root))
    # Nothing could use the result without one.
    load_tokenizer(source)
    try:
        return drop_layers(source, dropped, output)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from None


def layer_numbers(source: Source) -> list[int]:
    """The numbers of the layers that a folder's tensors name, ascending."""
    names = [name for path in weight_files(source.folder) for name in tensor_names(path)]
    prefix = _stack_on_disk(names, source, at_least=1) + "."
    return sorted({int(name[len(prefix) :].partition(".")[0]) for name in names if name.startswith(prefix)})


def _stack_on_disk(names: Iterable[str], source: Source, *, at_least: int | None = None) -> str:
    """The stack's path as the files have it: among those with enough layers, the one most like the model's own.

    It may lack the name of the base model (`h` for `transformer.h`), or have its parts in another order
    (`language_model.model.layers` for `model.language_model.layers`).

    Raises:
        ModelError: none, or several.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            numbers.setdefault(name[: match.start()], set()).add(int(match[1]))
    wanted = set(range(source.num_layers if at_least is None else at_least))
    parts = source.stack.split(".")
    alike = {
        path: len(set(parts).intersection(path.split("."))) / len(set(parts).union(path.split(".")))
        for path, found in numbers.items()
        if found >= wanted and path.split(".")[-1] == parts[-1]
    }
    best = [path for path, shared in alike.items() if shared == max(alike.values())]
    if len(best) != 1:
        raise ModelError(
            f"the weights of {source.name} must name the layers 0 to {source.num_layers - 1} under {source.stack}, "
            f"found {', '.join(best) or 'none'}"
        )
    return best[0]


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

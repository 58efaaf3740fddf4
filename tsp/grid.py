"""A list where a setting takes one value makes a sweep: every combination of the lists is a job.

`prune: {method: [tsp, sleb], ratio: [0.125, 0.25]}` in a YAML file, `--method tsp,sleb` and
`--set transfer=[none,finetune]` on the command line are all the same. A setting that is a list itself
(`eval.sources`, `prune.drop`) is varied by a list of lists. Where one grid would hold too much, a file has several,
each on top of the rest of the file:

    sweep:
      - {prune: {method: trsp}}
      - {prune: {method: [sleb, shortgpt]}, transfer: [none, finetune]}
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from tsp.config import JobConfig, flatten, merged, nest
from tsp.errors import ConfigError


def grids_of(file: Mapping[str, Any]) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """An experiment file without its `sweep`, and that; a single empty grid where there is none.

    Raises:
        ConfigError: `sweep` is no list of mappings.
    """
    rest = dict(file)
    grids = rest.pop("sweep", [{}])
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, Mapping) for grid in grids):
        raise ConfigError(f"sweep must be a list of mappings, each a part of the config with lists, got {grids!r}")
    return rest, grids


def choices(grid: Mapping[str, Any], stated: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every job of a grid, as what tells it from the others: the values that are varied, and what the grid itself says.

    Args:
        grid: of `grids_of`.
        stated: layers of a config, the grid among them; later ones win.
    """
    whole = merged(stated)
    axes, flat = varied(whole), flatten(whole)
    # A stronger layer may have put one value in the place of a section, which is then refused with the config.
    own = {key: flat[key] for key in flatten(grid) if key in flat and key not in axes}
    for choice in combinations(axes):
        yield own | choice


def varied(settings: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings that are varied, by dotted key, with their values.

    Args:
        settings: nested, merged from all that the user stated.

    Raises:
        ConfigError: a list without values.
    """
    found = {key: value for key, value in flatten(settings).items() if isinstance(value, list) and _varies(key, value)}
    empty = [key for key, values in found.items() if not values]
    if empty:
        raise ConfigError(f"{empty[0]} is a list without values; give at least one, or one value without a list")
    return found


def combinations(axes: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value per setting; the last setting changes fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def in_words(choice: Mapping[str, Any]) -> str:
    """A choice as a person reads it: `prune.method sleb, seed 0`."""
    return ", ".join(f"{key} {value}" for key, value in choice.items())


def layers_of(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A choice as layers of a config."""
    return [nest(key, value) for key, value in choice.items()]


def kinds_of(key: str) -> tuple[Any, ...]:
    """The types of values that a setting takes, by its dotted key; none where there is no such setting."""
    section: Any = JobConfig
    for part in key.split("."):
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            return ()
        section = field.annotation
    return get_args(section) if get_origin(section) in (Union, UnionType) else (section,)


def _varies(key: str, values: list[Any]) -> bool:
    if not _takes_list(key):
        return True
    return bool(values) and all(isinstance(value, list) for value in values)


def _takes_list(key: str) -> bool:
    kinds = kinds_of(key)
    # No setting of ours: the config itself complains.
    return not kinds or any(get_origin(kind) in (tuple, list) or kind in (tuple, list) for kind in kinds)

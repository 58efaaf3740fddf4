"""Several nodes check a job each for itself; what is wrong on one is said, and ends the job, on all."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from tsp.engine import join
from tsp.errors import ConfigError, portable
from tsp.heartbeat import name_of
from tsp.machine import is_one_node

Value = TypeVar("Value")


def agreed(prepare: Callable[[], Value], inputs: Callable[[Value], Mapping[str, Any]]) -> Value:
    """What `prepare` returns; the same call on every rank. On one node nobody is asked: all see the same.

    Args:
        prepare: reads this node's files; nothing else is done before.
        inputs: what all nodes have to have alike, by name.

    Raises:
        ConfigError: nodes have not read the same.
        TspError: of `prepare`, on this node or another.
    """
    if is_one_node():
        return prepare()
    join()
    rank = torch.distributed.get_rank()
    value, read, error = None, None, None
    try:
        value = prepare()
        read = dict(inputs(value))
    except Exception as raised:  # noqa: BLE001  The others would wait for this node.
        error = raised
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    mine = (name_of(rank), read, None if error is None else portable(error, rank))
    torch.distributed.all_gather_object(everyone, mine)
    if error is not None:
        raise error
    for name, _, told in everyone:
        if told is not None:
            raise type(told)(f"{told} ({name})")
    first, expected, _ = everyone[0]
    for name, other, _ in everyone:
        differing = [key for key, content in expected.items() if other[key] != content]
        if differing:
            raise ConfigError(f"{name} has other {' and '.join(differing)} than {first}; give all nodes the same")
    assert value is not None
    return value

"""Count what is made while some code runs: bytes that somebody still holds, and operations.

    live, flops = LiveBytes(), operations()
    with flops, live:
        loss(model(tokens)).backward()
    print(live.peak, flops.get_total_flops())

On tensors with data and on fake ones alike.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered, and that somebody still holds."""

    def __init__(self, *, collect: bool = False) -> None:
        """Count from 0.

        Args:
            collect: garbage, before each tensor is counted; slow, see `cheap_collections`.
        """
        super().__init__()
        self.now = self.peak = 0
        self._collect = collect
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._count(storage)
        return made

    def _count(self, storage: Any) -> None:
        if self._collect:
            gc.collect()
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def operations() -> FlopCounterMode:
    """A counter that knows attention on a CPU, too; causal attention counts as if each token saw all others."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


@contextmanager
def cheap_collections() -> Iterator[None]:
    """Garbage is looked for only among what is made in the block."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

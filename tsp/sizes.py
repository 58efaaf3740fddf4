"""What a model costs to hold: GiB of weights, and bytes of key-value cache per token; measured on a fake model."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tsp.safety import weight_files
from tsp.skeleton import build_skeleton
from tsp.source import Source
from tsp.surgery import kept_layers, mended_config

_LENGTHS = (8, 16)


def size_gib(source: Source, dropped: Sequence[int] = ()) -> float:
    """GiB of the checkpoint's weights without some layers, in the dtype they have on disk; quantized: of its files."""
    if source.quantized_by and not dropped:
        return sum(path.stat().st_size for path in weight_files(source.folder)) / 2**30
    parameters = source.num_parameters - sum(source.layer_parameters[index] for index in dropped)
    return parameters * source.dtype.itemsize / 2**30


def cache_bytes_per_token(source: Source, dropped: Sequence[int] = ()) -> float | None:
    """By how many bytes the cache of one sequence grows with a token, in the dtype of the weights on disk.

    Measured and not reckoned by a formula, since families differ: the model's skeleton (shapes without data) is run
    with a cache on 8 and on 16 tokens, and the sizes of all tensors in the two caches are compared. A layer whose state
    does not grow (a state space, linear attention, a full window) adds nothing. None: the model runs uncached only.
    """
    return _growth(source, tuple(dropped)) if source.runs_cached else None


@cache  # A second of work, and the jobs of a sweep ask for the same again.
def _growth(source: Source, dropped: tuple[int, ...]) -> float:
    config = mended_config(source.config, kept_layers(source.num_layers, dropped)) if dropped else source.config
    with FakeTensorMode(), torch.no_grad():
        skeleton = build_skeleton(config, trust=source.trust_remote_code).eval()
        short, long = (
            _cached_bytes(skeleton(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=True), source.dtype)
            for length in _LENGTHS
        )
    return (long - short) / (_LENGTHS[1] - _LENGTHS[0])


def _cached_bytes(output: Any, dtype: torch.dtype) -> int:
    """Of everything in a model's output but plain tensors, such as logits."""
    kept = [value for value in output.values() if not isinstance(value, Tensor)]
    tensors = {id(tensor): tensor for tensor in _tensors(kept, set())}
    # The skeleton computes in bf16, see `build_skeleton`; what is not of floating point keeps its size.
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())
        for tensor in tensors.values()
    )


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that hang on an object, whatever the class of the cache."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inner: Any = value.values()
    elif isinstance(value, list | tuple | set):
        inner = value
    else:
        inner = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
    for one in inner:
        yield from _tensors(one, seen)

"""Speed of the prompt pass: one sequence, no cache, one run to warm up, then the mean (method.md, section 6)."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def prompt_of(blocks_NT: Tensor, max_positions: int) -> Tensor:
    """The first 2,048 tokens of a corpus `[N, T]`, or as many as the model has positions; `[T]`."""
    return blocks_NT.flatten()[: min(2048, max_positions)]


def median_pass_s(forward: Callable[[Tensor], Tensor], tokens_T: Tensor, num_runs: int) -> float:
    """Seconds of a forward pass, the median after one to warm up; arguments as those of `prompt_tokens_per_s`."""
    seconds = []
    with torch.no_grad():
        for _ in range(1 + num_runs):
            wait(tokens_T.device)
            started = time.perf_counter()
            forward(tokens_T[None])
            wait(tokens_T.device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def prompt_tokens_per_s(forward: Callable[[Tensor], Tensor], tokens_T: Tensor, num_runs: int) -> float:
    """Tokens per second of forward passes over one sequence.

    Args:
        forward: tokens `[1, T]` -> logits `[1, T, V]`.
        tokens_T: `[T]` int64, on the model's device.
        num_runs: timed passes.
    """
    with torch.no_grad():
        forward(tokens_T[None])
        wait(tokens_T.device)
        started = time.perf_counter()
        for _ in range(num_runs):
            forward(tokens_T[None])
        wait(tokens_T.device)
    return num_runs * len(tokens_T) / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    """Until what was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

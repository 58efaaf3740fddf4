"""Speed of the prompt pass: one sequence, no cache, one run to warm up, then the mean (method.md, section 6)."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


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

"""Measure something on each window of a corpus, the windows shared among the ranks."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tsp.progress import phase


def per_window(
    measure: Callable[[Tensor], Tensor],
    blocks_NT: Tensor,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    device: torch.device | str = "cpu",
    name: str | None = "evaluate",
) -> Tensor:
    """K numbers of each window, without gradient.

    Args:
        measure: `[b, ...]` of `blocks` -> `[b, K]`.
        blocks_NT: windows `[N, T]` int64; or whatever stands for them, their numbers `[N]`, say.
        batch_size: windows per call and rank.
        rank: of this process.
        world_size: ranks. Every rank makes the same number of calls, as sharded weights demand.
        total: sum of a tensor over the ranks.
        device: of the model.
        name: of the phase, for the progress bar; None: without one, within a phase that has its own.

    Returns:
        `[N, K]` fp64, the same on every rank.
    """
    values_NK: Tensor | None = None
    mine = batches(blocks_NT, batch_size=batch_size, rank=rank, world_size=world_size, device=device, name=name)
    with torch.no_grad():
        for tokens_bT, counted in mine:
            values = measure(tokens_bT).double()
            if values_NK is None:
                values_NK = torch.zeros(len(blocks_NT), values.shape[1], dtype=torch.float64, device=device)
            values_NK[counted] = values[: counted.stop - counted.start]
    assert values_NK is not None, "a corpus has at least one window"
    return total(values_NK)


def batches(
    blocks_NT: Tensor,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    name: str | None = "evaluate",
) -> Iterator[tuple[Tensor, slice]]:
    """This rank's share of the windows; arguments as those of `per_window`.

    Yields:
        Tokens `[b, T]` on the device, and which windows of `blocks_NT` they are. A rank that has none left goes along
        with the first window, and the slice is empty: it counts nothing.
    """
    starts = range(0, len(blocks_NT), batch_size * world_size)
    for start in phase(starts, name or "", len(starts), show=rank == 0 and name is not None):
        first = start + rank * batch_size
        batch = blocks_NT[first : first + batch_size]
        yield (batch if len(batch) else blocks_NT[:1]).to(device), slice(first, first + len(batch))

"""What the processes of a job tell each other."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from tsp.errors import portable

Value = TypeVar("Value")


class Ranks:
    """This process among the others; every method is called on all of them alike."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device

    @property
    def is_first(self) -> bool:
        """Rank 0: it alone logs, writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, same shape; a new tensor."""
        total = values.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def sharing(self, batch_size: int) -> dict[str, Any]:
        """How windows are shared among the ranks, for `evaluation.windows.per_window`."""
        ranks: dict[str, Any] = {"rank": self.rank, "world_size": self.world_size, "total": self.sum}
        return ranks | {"batch_size": batch_size, "device": self.device}

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks, same shape; a new tensor."""
        return self.sum(values) / self.world_size

    def every_rank(self, value: float) -> list[float]:
        """One number of each rank, by rank."""
        mine = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        mine[self.rank] = value
        return self.sum(mine).tolist()

    def from_first(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def tensor_from_first(self, read: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What rank 0 reads, on the CPU of every rank; on a GPU there is no more than this one tensor of it."""
        if self.world_size == 1:
            return read().cpu()
        sent = read().to(self.device) if self.is_first else torch.empty(shape, dtype=dtype, device=self.device)
        torch.distributed.broadcast(sent, src=0)
        return sent.cpu()

    def on_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0's call returns, on every rank; an error of it is raised on every rank."""
        value, error = None, None
        if self.is_first:
            try:
                value = make()
            except Exception as raised:  # noqa: BLE001  The others would wait for rank 0's word forever.
                error = raised
        value, told = self.from_first((value, error if error is None else portable(error, 0)))
        if told is not None:
            raise error or told
        return value

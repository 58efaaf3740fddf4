"""What this process runs on: dtype of the weights, ranks of the node, peak memory, what deepspeed has compiled."""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsp.config import JobConfig, flatten
from tsp.errors import ConfigError

Weights = list[tuple[Any, Tensor]]
"""Parameters, and values that they had."""

GIB = 2**30
CPU_OP = "deepspeed_shm_comm"
"""What deepspeed 0.19 compiles at the first job on a CPU: reductions among ranks through shared memory."""


def ranks_on_this_node() -> int:
    """As DeepSpeed's launcher says it, or torchrun."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def is_one_node() -> bool:
    """Whether all ranks are on this node."""
    return int(os.environ.get("WORLD_SIZE", "1")) <= ranks_on_this_node()


def is_first_node() -> bool:
    """Whether rank 0 is on this node: it alone writes the output."""
    return int(os.environ.get("CROSS_RANK") or os.environ.get("GROUP_RANK") or 0) == 0


def put_ninja_on_path() -> None:
    """deepspeed compiles at its first use, and torch looks for ninja on PATH only.

    A virtual environment that is not activated is not there.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def join_nobody() -> None:
    """Be the only process of a job where no launcher has said otherwise; needs neither a port nor a network."""
    if "MASTER_ADDR" not in os.environ and not torch.distributed.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def weights_dtype(config: JobConfig, device: torch.device) -> torch.dtype:
    """The dtype of the weights in memory that `model.dtype` means on this device."""
    auto = "fp32" if device.type == "cpu" else "bf16"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[auto if config.model.dtype == "auto" else config.model.dtype]


def start_peak(device: torch.device) -> None:
    """Forget the peak so far, so that each job of a sweep has its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Not allowed in some containers: then it is the peak of the whole process.
    with contextlib.suppress(OSError):
        # Linux: 5 resets the peak of the resident memory (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process since `start_peak`: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024 / GIB


def compiled_cpu_op() -> Path | None:
    """The operation that deepspeed compiles at the first job on a CPU, where torch keeps it; None: not compiled yet."""
    if torch.version.hip is not None:
        build = f"rocm{torch.version.hip.replace('.', '')}"
    else:
        build = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    # As torch.utils.cpp_extension has it.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    of_python = cache / f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_{build}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or of_python)
    compiled = folder / CPU_OP / f"{CPU_OP}.so"
    return compiled if compiled.exists() else None


def unlink_shared_buffer(rank: int) -> None:
    """Take away the name of the memory that deepspeed 0.19 shares on a CPU, once every rank has it open.

    It leaves the file behind, 66 MiB in /dev/shm for each rank and port, and a job of the same port could open that of
    a dead one.
    """
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def held_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, else all of it."""
    return parameter.ds_tensor if hasattr(parameter, "ds_id") else parameter


def require_restorable(sharding: Mapping[str, Any], who: str, instead: str) -> None:
    """Refuse to put weights back that are offloaded to a disk: there is nothing in memory to copy.

    deepspeed 0.19 leaves one element in the place of each shard of 1 MiB or more.

    Args:
        sharding: the DeepSpeed config.
        who: wants weights put back.
        instead: what else to do.

    Raises:
        ConfigError: parameters are offloaded to nvme.
    """
    place = "zero_optimization.offload_param.device"
    if flatten(sharding).get(place) == "nvme":
        raise ConfigError(
            f"--ds: {place} is nvme, and {who} puts weights back, which cannot be done on a disk; offload to cpu, or "
            f"{instead}"
        )


def copied_weights(model: nn.Module) -> Weights:
    """A copy of what this rank holds of a model's parameters, in host memory."""
    parameters: list[Any] = list(model.parameters())
    assert not any(getattr(parameter, "nvme_swapper", None) for parameter in parameters), "see `require_restorable`"
    return [(parameter, held_part(parameter).detach().to("cpu", copy=True)) for parameter in parameters]


def put_back(weights: Weights) -> None:
    """Give the parameters of `copied_weights` the values that they had."""
    for parameter, values in weights:
        if hasattr(parameter, "ds_id") and parameter.data.numel():
            # ZeRO-3 leaves small parameters whole beside their shards.
            parameter.partition(has_been_updated=False)
        held_part(parameter).data.copy_(values)


def held_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter that this rank holds between two steps."""
    held = parameter.numel()
    if hasattr(parameter, "ds_tensor"):
        held = max(held, parameter.ds_tensor.numel())
    return held * parameter.element_size()

"""`tsp plan --calibrate`: what this machine reaches, and what a process holds beside what it needs.

A few layers of the model, with random weights, go through a few steps of each stage, by the engine as in a job. The
work of a step is known (`footprint.py`), so its time gives the speed. The process holds something before it has a
model, and then more than is live: freed memory that the allocator keeps, in proportion to what a step makes.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from tsp.capacity import GIB, Estimate, Fleet, Phase
from tsp.config import JobConfig
from tsp.decoder import Decoder
from tsp.engine import Engine
from tsp.footprint import Shape
from tsp.machine import peak_gib, start_peak, weights_dtype
from tsp.methods import transfer_verb
from tsp.methods.base import Bench
from tsp.methods.trsp import stage1
from tsp.selection import spread
from tsp.settings import Gpu, PruneSection
from tsp.sharding import resolve
from tsp.skeleton import random_model
from tsp.tracking.null import NullTracker

_STEPS = 3
_LAYERS = {"cpu": 8, "cuda": 2}
"""Of the probe: on a CPU enough for memory that is freed and kept to outweigh what loading has left behind."""
_UNKNOWN = Gpu(memory_gib=1, tflops=1, node_gb_s=1, network_gb_s=1, reserved_gib=0)
_LINKS_GB_S = 10.0
"""Between ranks of one machine, through its memory; one process cannot measure it."""


def gpu_dtype(config: JobConfig) -> torch.dtype:
    """Of the weights in memory, on any GPU."""
    return weights_dtype(config, torch.device("cuda"))


def own_dtype(config: JobConfig) -> torch.dtype:
    """Of the weights in memory, on this machine."""
    return weights_dtype(config, _device())


def measured_device(shape: Shape, config: JobConfig, sharding: Mapping[str, Any]) -> Gpu:
    """This machine's device, as `tsp plan` needs it.

    Args:
        shape: of the model; a few of its layers are built.
        config: of the job; its micro-batch on one rank is what is run.
        sharding: the content of the DeepSpeed JSON.
    """
    device = _device()
    kept = spread(range(shape.num_layers), min(_LAYERS[device.type], shape.num_layers))
    small = shape.with_layers(kept)
    probe = probe_of(config)
    bench = random_bench(small, probe, sharding)
    reserved_gib = _reserved_gib(bench)
    alone = Fleet(nodes=1, gpus=1, gpu=_UNKNOWN)
    phases = {phase.name: phase for phase in Estimate(probe, small, sharding, alone, dtype=bench.engine.dtype).phases}
    peaks, seconds = _peaks(bench, trains="transfer" in phases)
    # A GPU's peak is what torch has allocated, a CPU's all that the process holds.
    beside_gib = reserved_gib if device.type == "cpu" else 0.0
    return Gpu(
        memory_gib=_memory_gib(device),
        tflops=phases["select"].flops / _STEPS / statistics.median(seconds[1:]) / 1e12,
        utilisation=1.0,
        node_gb_s=_LINKS_GB_S,
        network_gb_s=_LINKS_GB_S,
        reserved_gib=reserved_gib,
        slack=max(1.0, *(slack(phases[name], peak - beside_gib) for name, peak in peaks.items())),
    )


def slack(phase: Phase, held_gib: float) -> float:
    """With which so much is held in all: `Gpu.slack`."""
    return 1 + (held_gib - phase.total_gib) / phase.memory_gib["step"]


def probe_of(config: JobConfig) -> JobConfig:
    """The job as the probe runs it: whatever its method, a few steps of gates that are learned, and of its transfer."""
    return config.model_copy(
        update={
            # Also without the job's bounds: a few layers may be too few for them.
            "prune": PruneSection(method="tsp", num_drop=1),
            "stage1": config.stage1.model_copy(update={"schedule": "budget", "steps": _STEPS}),
            "stage2": config.stage2.model_copy(update={"steps": _STEPS, "lr": 1e-4}),
        }
    )


def _peaks(bench: Bench, *, trains: bool) -> tuple[dict[str, float], list[float]]:
    """The most that was held in each phase, GiB, and the seconds of each step of stage 1."""
    engine, seconds, peaks = bench.engine, [], {}
    bench.after_step = lambda stage, stats, gates: seconds.append(stats.seconds)
    with engine.mounted(bench.decoder.model) as bench.model:
        stage1.score(bench, 1)
    [peaks["select"]] = engine.peak_memory_gib()
    transfer = transfer_verb(bench.config.transfer) if trains else None
    if transfer is not None:
        transfer(bench, (bench.decoder.num_layers // 2,), save_dtype=engine.dtype)
        [peaks["transfer"]] = engine.peak_memory_gib()
    return peaks, seconds[:_STEPS]


def _reserved_gib(bench: Bench) -> float:
    """Taken beside the weights, by this process before the first step; on a GPU by all, without what torch holds."""
    device = bench.engine.device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free - torch.cuda.memory_reserved(device)) / GIB
    start_peak(device)
    return peak_gib(device) - bench.engine.weights_gib(bench.decoder.model)[0]


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return psutil.virtual_memory().total / GIB


def random_bench(shape: Shape, config: JobConfig, sharding: Mapping[str, Any]) -> Bench:
    """All that a method works with, in one process: a model of this shape and tokens, both random, and no tracking.

    Args:
        shape: of the model.
        config: of the job.
        sharding: the content of the DeepSpeed JSON.
    """
    dtype = own_dtype(config)
    resolved = resolve(sharding, config, world_size=1, hidden_size=shape.hidden_size, dtype=dtype)
    engine = Engine.start(config, resolved)
    with engine.loading():
        model = random_model(shape.config, dtype, trust=shape.trust)
    decoder = Decoder(model, shape.stack, shape.num_outputs)
    block_tokens = config.data.block_tokens or min(2048, shape.max_positions)
    return Bench(
        config=config,
        engine=engine,
        decoder=decoder,
        blocks_NT=torch.randint(shape.vocab_size, (config.train.batch_size, block_tokens)),
        tracker=NullTracker(),
        load_again=lambda: Decoder(
            random_model(shape.config, dtype, trust=shape.trust), shape.stack, shape.num_outputs
        ),
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

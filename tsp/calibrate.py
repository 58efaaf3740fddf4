"""`tsp plan --calibrate`: what this machine reaches, and what a process takes before it has a model.

Two layers of the model, with random weights, go through a few steps of stage 1, by the engine as in a job. The work
of a step is known (`footprint.py`), so its time gives the speed; and what the process held beyond the reckoning is
what it takes anyway.
"""

import os
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from tsp.capacity import GIB, Estimate, Fleet
from tsp.config import JobConfig
from tsp.decoder import Decoder
from tsp.engine import Engine
from tsp.footprint import Shape
from tsp.machine import weights_dtype
from tsp.methods.base import Bench
from tsp.methods.trsp import stage1
from tsp.settings import Gpu
from tsp.sharding import resolve
from tsp.skeleton import random_model
from tsp.tracking.null import NullTracker

_STEPS = 4
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
        shape: of the model; two of its layers are built.
        config: of the job; its micro-batch on one rank is what is run.
        sharding: the content of the DeepSpeed JSON.
    """
    small = shape.with_layers((0, shape.num_layers // 2))
    probe = config.model_copy(
        update={
            "prune": config.prune.model_copy(update={"num_drop": 1, "drop": None}),
            "stage1": config.stage1.model_copy(update={"schedule": "budget", "steps": _STEPS}),
        }
    )
    bench = random_bench(small, probe, sharding)
    engine = bench.engine
    seconds: list[float] = []
    bench.after_step = lambda stage, stats, gates: seconds.append(stats.seconds)
    with engine.mounted(bench.decoder.model) as bench.model:
        stage1.score(bench, 1)
    [peak_gib] = engine.peak_memory_gib()
    alone = Fleet(nodes=1, gpus=1, gpu=_UNKNOWN)
    selection = Estimate(probe, small, sharding, alone, dtype=engine.dtype).phases[1]
    memory = (
        torch.cuda.get_device_properties(engine.device).total_memory
        if engine.device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return Gpu(
        memory_gib=memory / GIB,
        tflops=selection.flops / _STEPS / statistics.median(seconds[1:]) / 1e12,
        utilisation=1.0,
        node_gb_s=_LINKS_GB_S,
        network_gb_s=_LINKS_GB_S,
        reserved_gib=max(0.0, peak_gib - selection.total_gib),
    )


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
        load_again=lambda: decoder,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

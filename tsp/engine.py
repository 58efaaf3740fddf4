"""The only module that knows DeepSpeed: processes, sharding, forward, backward, step.

    engine = Engine.start(config, sharding)
    with engine.loading():                      # from_pretrained reads straight into ZeRO-3 shards
        model = ...
    with engine.mounted(model) as frozen:       # no optimizer: forward, and backward through activations
        frozen.backward(loss(frozen(tokens)))
    with engine.mounted(model, AdamW(...)) as trained:
        trained.backward(loss(trained(tokens))); trained.step(lr)

A model without trainable parameters is mounted without an optimizer of DeepSpeed's: ZeRO-3 then shards and gathers the
weights, also in the backward pass, and nothing more; lower stages have nothing to shard. Gates are not parameters (see
`gates.py`); their gradient is averaged with `mean`. One rank and many take the same path.
"""

import copy
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tsp.config import JobConfig, TrainConfig
from tsp.heartbeat import joined
from tsp.machine import (
    GIB,
    compiled_cpu_op,
    copied_weights,
    held_bytes,
    join_nobody,
    peak_gib,
    put_back,
    put_ninja_on_path,
    ranks_on_this_node,
    start_peak,
    unlink_shared_buffer,
    weights_dtype,
)
from tsp.mounted import Mounted
from tsp.optimizer_state import let_go
from tsp.ranks import Ranks
from tsp.sharding import AdamW, Gradients, with_optimizer

log = logging.getLogger("tsp")


def join() -> torch.device:
    """Join the other processes of the job, unless that is done; the device of this one."""
    put_ninja_on_path()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    join_nobody()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" and compiled_cpu_op() is None and os.environ["RANK"] == "0":
        log.warning("deepspeed compiles an operation for this CPU now, about a minute; the next job finds it")
    if not gc.get_freeze_count():
        gc.freeze()  # The collection before each mounting need not look at what the imports made.
    deepspeed.init_distributed(verbose=False)
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    joined()
    return torch.device(accelerator.current_device_name())


class Engine(Ranks):
    """This process's part of the job. Make it with `Engine.start`."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        sharding: dict[str, Any],
        settings: TrainConfig,
    ) -> None:
        super().__init__(rank, world_size, device)
        self.dtype = dtype
        """Of the weights in memory."""
        self.sharding = sharding
        """The DeepSpeed config, without any `auto`."""
        self._accumulation = settings.accumulation
        self._activation_checkpointing = settings.activation_checkpointing
        self._frozen: dict[nn.Module, ExitStack] = {}
        """Mountings in ZeRO-3 without an optimizer that last now."""

    @classmethod
    def start(cls, config: JobConfig, sharding: Mapping[str, Any]) -> "Engine":
        """Join the other processes; on a CPU share the cores among them and be deterministic.

        Args:
            config: the job's.
            sharding: what `sharding.resolve` made of the DeepSpeed JSON.
        """
        import transformers

        device = join()
        if device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_this_node()))
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.distributed.barrier()
            unlink_shared_buffer(torch.distributed.get_rank())
        torch.manual_seed(config.seed)
        start_peak(device)
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if rank or not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        return cls(rank, world_size, device, weights_dtype(config, device), dict(sharding), config.train)

    @property
    def zero_stage(self) -> int:
        return self.sharding["zero_optimization"]["stage"]

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Under ZeRO-3 `from_pretrained` puts each weight straight into shards, while this block lasts."""
        if self.zero_stage < 3:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig

        alive = HfDeepSpeedConfig(copy.deepcopy(self.sharding))
        try:
            yield
        finally:
            del alive
            gc.collect()

    @contextmanager
    def mounted(self, model: nn.Module, optimizer: AdamW | Gradients | None = None) -> Iterator["Mounted"]:
        """A model ready to run, in DeepSpeed's hands for the length of a block.

        A model that is mounted with nothing to train may be mounted again inside of that block, to train it: the outer
        mounting is taken off for so long.

        Args:
            model: its parameters with `requires_grad` are trained.
            optimizer: None: nothing is trained.
        """
        trainable = any(parameter.requires_grad for parameter in model.parameters())
        assert trainable == (optimizer is not None), "an optimizer and something to train, or neither"
        self._set_checkpointing(model)
        gc.collect()  # An engine is full of cycles, and the one before holds an optimizer perhaps.
        if self.zero_stage < 3 and optimizer is None:
            yield Mounted(model.to(self.device), None, self._accumulation)
            return
        if optimizer is None:
            with ExitStack() as stack:
                stack.enter_context(self._in_deepspeed(model, None))
                self._frozen[model] = stack
                try:
                    yield Mounted(model, None, self._accumulation)
                finally:
                    del self._frozen[model]
            return
        outer = self._frozen.get(model)
        if outer is not None:
            outer.close()
        with self._in_deepspeed(model, optimizer) as engine:
            yield Mounted(model, engine, self._accumulation)
        if outer is not None:
            outer.enter_context(self._in_deepspeed(model, None))

    @contextmanager
    def _in_deepspeed(self, model: nn.Module, optimizer: AdamW | Gradients | None) -> Iterator[Any]:
        import deepspeed

        hooks = [dict(held) for held in _hooks(model)]
        engine = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad] or None,
            config=with_optimizer(self.sharding, optimizer, self.world_size),
        )[0]
        try:
            yield engine
        finally:
            engine.destroy()
            # deepspeed 0.19 leaves hooks on the model, which keep engine and optimizer alive, and the model in a list.
            for held, before in zip(_hooks(model), hooks, strict=True):
                for key in held.keys() - before.keys():
                    del held[key]
            stack = deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
            stack[:] = [module for module in stack if module is not model]
            let_go(model)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """All of a parameter's gradient on every rank, its shape, where the model is mounted with `Gradients`.

        In the dtype in which DeepSpeed adds gradients up: that of the weights.
        """
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
        return torch.zeros((), device=self.device) if gradient is None else gradient

    @contextmanager
    def gathered(self, parameters: Iterable[Tensor], *, modify: bool = False) -> Iterator[None]:
        """The whole of some sharded parameters on every rank; with `modify`, rank 0's changes are kept by all."""
        import deepspeed

        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        context = (
            deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None)
            if sharded
            else nullcontext()
        )
        with context:
            yield

    @contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """When the block ends the weights are what they were; each rank keeps a copy of its part in host memory."""
        kept = copied_weights(model)
        try:
            yield
        finally:
            put_back(kept)
            model.requires_grad_(False)

    def weights_gib(self, model: nn.Module) -> list[float]:
        """GiB of weights that each rank holds between two steps."""
        return [round(gib, 6) for gib in self.every_rank(sum(held_bytes(p) for p in model.parameters()) / GIB)]

    def peak_memory_gib(self) -> list[float]:
        """Each rank's peak since `start`: allocated on the GPU, or resident on a CPU."""
        return [round(gib, 3) for gib in self.every_rank(peak_gib(self.device))]

    def stop(self) -> None:
        """Leave the other processes."""
        joined().stop()
        torch.distributed.destroy_process_group()

    def _set_checkpointing(self, model: nn.Module) -> None:
        """transformers checkpoints activations in training mode only; `checkpoint.load` has set all dropout to 0."""
        model.train(self._activation_checkpointing)
        if self._activation_checkpointing:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _hooks(model: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return model._forward_pre_hooks, model._forward_hooks

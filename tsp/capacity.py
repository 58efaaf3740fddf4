"""What a job will cost: memory of each rank by part, time and traffic of each phase, disk; and does it fit?

    plan = Estimate(config, shape_of(config.model), sharding, Fleet(nodes=1, gpus=8, gpu=known_gpu("h100-80")))

Memory is reckoned from what DeepSpeed keeps of weights, gradients and optimizer, and from what a step makes itself
(`footprint.py`). Time is work over speed: `Gpu.utilisation` of the data sheet's peak, or what a probe has measured.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tsp.config import JobConfig, bound_of, likely_number, number_to_drop
from tsp.footprint import Pass, Shape
from tsp.methods import TRANSFERS, is_learned
from tsp.selection import rungs
from tsp.settings import Gpu
from tsp.sharding import offloads
from tsp.space import with_settings
from tsp.states import KEPT

GIB = 2**30
_MAX_LIVE_PARAMETERS = 10**9
"""DeepSpeed's default for `stage3_max_live_parameters`: so many are kept whole for a next use."""
_MOST_RANKS = 1024
_ADAM_BYTES = 12
"""Of a trained weight: fp32 master and two moments."""
_SEARCH_SHARE = 0.35
"""Of plain SLEB's passes, what `stage1.schedule: search` takes (docs/experiments.md)."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """All devices of the job."""

    nodes: int
    gpus: int
    """Of each node."""
    gpu: Gpu

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def gb_s(self) -> float:
        """Of the slowest link that a gather has to pass, for each rank."""
        return self.gpu.network_gb_s if self.nodes > 1 else self.gpu.node_gb_s


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the job, on one rank."""

    name: str
    memory_gib: Mapping[str, float]
    """By part."""
    tokens: int
    """Of all ranks, in the whole phase; a token that is looked at again counts again."""
    flops: float
    """Of all ranks, in the whole phase."""
    traffic_gb: float
    """Sent and received by a rank in one pass through the model with all that belongs to it."""
    passes: float

    @property
    def total_gib(self) -> float:
        return sum(self.memory_gib.values())

    def seconds(self, fleet: Fleet) -> float:
        """Computing and gathering overlap: the slower one counts."""
        computing = self.flops / (fleet.ranks * fleet.gpu.tflops * 1e12 * fleet.gpu.utilisation)
        return max(computing, self.passes * self.traffic_gb / fleet.gb_s)


class Estimate:
    """Of one job on one fleet."""

    def __init__(
        self,
        config: JobConfig,
        shape: Shape,
        sharding: Mapping[str, Any],
        fleet: Fleet,
        *,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """What it depends on.

        Args:
            config: of the job.
            shape: of its model.
            sharding: what `sharding.resolve` made of the DeepSpeed JSON, or its content.
            fleet: what it runs on.
            dtype: of the weights in memory.
        """
        self.config, self.shape, self.fleet = config, shape, fleet
        self._sharding, self._dtype = sharding, dtype
        self._zero = sharding["zero_optimization"]
        wanted = number_to_drop(config.prune, shape.num_layers)
        self.num_drop = likely_number(config.prune, shape.num_layers) if wanted is None else max(1, wanted)

    @cached_property
    def phases(self) -> list[Phase]:
        """In the order of the job; a transfer that trains nothing is no phase."""
        return [self._evaluation(), self._selection(), *self._transfer()]

    @property
    def peak_gib(self) -> float:
        return max(phase.total_gib for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.fleet.gpu.memory_gib

    @property
    def checkpoint_gib(self) -> float:
        """Of the pruned model in bf16."""
        kept = self.shape.num_parameters - self.num_drop * max(self.shape.layer_parameters)
        return 2 * kept / GIB

    @property
    def disk_gib(self) -> float:
        """Dense and pruned checkpoint, the registry's copy of the latter, training states."""
        numbers = 2 if self.config.prune.max_ppl_ratio else 1  # A search keeps its best one's, too.
        states = numbers * KEPT * _ADAM_BYTES * self._trained() / GIB if self._trains else 0.0
        return 2 * self.shape.num_parameters / GIB + 2 * self.checkpoint_gib + states

    def changes(self) -> "Iterator[tuple[str, Estimate]]":
        """Against a lack of memory, the cheapest first, each with those before it; batches stay whole on every rank."""
        settings: dict[str, Any] = {}
        train, fleet = self.config.train, self.fleet
        share = train.batch_size // fleet.ranks
        for accumulation in range(train.accumulation + 1, share + 1):
            if share % accumulation == 0:
                settings["train.accumulation"] = accumulation
                yield self._changed(settings, fleet)
        for key, value in (("eval.batch_size", 1), ("train.activation_checkpointing", True)):
            settings[key] = value
            yield self._changed(settings, fleet)
        while fleet.ranks < _MOST_RANKS:
            fleet = replace(fleet, gpus=2 * fleet.gpus) if fleet.gpus < 8 else replace(fleet, nodes=2 * fleet.nodes)
            share = math.ceil(train.batch_size / fleet.ranks)
            settings |= {"train.batch_size": share * fleet.ranks, "train.accumulation": share}
            yield self._changed(settings, fleet)

    def remedy(self) -> str | None:
        """The smallest change with which it fits; None: it fits, or none was found."""
        if self.fits:
            return None
        return next((words for words, changed in self.changes() if changed.fits), None)

    def _changed(self, settings: Mapping[str, Any], fleet: Fleet) -> "tuple[str, Estimate]":
        words = [f"--set {key}={str(value).lower()}" for key, value in settings.items()]
        if fleet != self.fleet:
            words.insert(0, f"--nodes {fleet.nodes} --gpus {fleet.gpus}")
        config = with_settings(self.config, settings)
        return " ".join(words), Estimate(config, self.shape, self._sharding, fleet, dtype=self._dtype)

    @property
    def _trains(self) -> bool:
        return TRANSFERS[self.config.transfer].trains

    def _block_tokens(self, wanted: int | None) -> int:
        return wanted or min(2048, self.shape.max_positions)

    def _weights(self, copies: int = 1) -> dict[str, float]:
        """GiB of the weights that a rank holds, and of those that it gathers."""
        size, parameters = self._dtype.itemsize, self.shape.num_parameters
        if self._zero["stage"] < 3:
            return {"weights": copies * parameters * size / GIB}
        live = self._zero.get("stage3_max_live_parameters", _MAX_LIVE_PARAMETERS)
        gathered = max(self.shape.largest_module, min(parameters, live))
        held = 0.0 if offloads(self._zero, "param") else copies * parameters * size / self.fleet.ranks / GIB
        return {"weights": held, "gathered": copies * gathered * size / GIB}

    def _phase(self, name: str, parts: Mapping[str, float], one: Pass, *, tokens: float, gathers: int) -> Phase:
        """From a pass to the whole.

        Args:
            name: of the phase.
            parts: of the memory, GiB, beside what the pass makes itself.
            one: pass of a rank.
            tokens: of all ranks in the whole phase.
            gathers: of all weights, in a pass with all that belongs to it.
        """
        cost, gpu = self.shape.cost(one, self._dtype), self.fleet.gpu
        shared = (1 - 1 / self.fleet.ranks) if self._zero["stage"] == 3 else 0.0
        passes = tokens / (one.batch * one.block_tokens * self.fleet.ranks)
        return Phase(
            name=name,
            memory_gib={**parts, "step": gpu.slack * cost.peak_bytes / GIB, "reserved": gpu.reserved_gib},
            tokens=round(tokens),
            flops=passes * cost.flops * self.fleet.ranks,
            traffic_gb=gathers * self.shape.num_parameters * self._dtype.itemsize * shared / 1e9,
            passes=passes,
        )

    def _measured(self, name: str, tokens: float, block_tokens: int) -> Phase:
        one = Pass(batch=self.config.eval.batch_size, block_tokens=block_tokens)
        return self._phase(name, self._weights(), one, tokens=tokens, gathers=1)

    def _evaluation(self) -> Phase:
        """Of the dense model, the bare drop and the pruned one; a corpus without a limit is taken for 128 windows."""
        config, block_tokens = self.config.eval, self._block_tokens(self.config.eval.block_tokens)
        states = 3 if self._trains else 2
        windows = (config.max_blocks or 128) * max(1, len(config.sources))
        return self._measured("evaluate", states * windows * block_tokens, block_tokens)

    def _selection(self) -> Phase:
        config, block_tokens = self.config, self._block_tokens(self.config.data.block_tokens)
        if is_learned(config) and config.prune.drop is None:
            rounds = self.num_drop if config.stage1.schedule == "greedy" else 1
            tokens = rounds * config.stage1.steps * config.train.batch_size * block_tokens
            return self._phase("select", self._weights(), self._learning("gates"), tokens=tokens, gathers=2)
        blocks = config.prune.score_blocks * self._scoring_passes() * self._idle() + config.prune.verify_blocks
        return self._measured("select", blocks * block_tokens, block_tokens)

    def _idle(self) -> float:
        """Where ranks have no scoring block of their own they go along with another's: computed over needed."""
        prune, ranks = self.config.prune, self.fleet.ranks
        spans = rungs(prune.score_blocks) if prune.method == "tsp" else [(0, prune.score_blocks)]
        parts = [(0.5**rung, stop - start) for rung, (start, stop) in enumerate(spans)]
        return sum(w * ranks * math.ceil(n / ranks) for w, n in parts) / sum(w * n for w, n in parts)

    def _scoring_passes(self) -> float:
        """Passes through the whole model with which a selection that trains nothing looks at each scoring block."""
        config, num_layers = self.config.prune, self.shape.num_layers
        if config.drop is not None or config.method in ("random", "tail", "magnitude", "dense"):
            return 0.0
        plain = sum(num_layers - gone for gone in range(self.num_drop))
        swaps = config.swap_rounds * num_layers / 2
        return {"tsp": _SEARCH_SHARE * plain, "sleb": plain / 2, "ppl": num_layers / 2}.get(config.method, 1.0) + swaps

    def _transfer(self) -> list[Phase]:
        config = self.config.stage2
        if not self._trains:
            return []
        one = replace(self._learning("transfer"), stage2=config, num_doomed=self.num_drop)
        copy = config.trainable == "full" and config.has_teacher
        owners = self.fleet.ranks if self._zero["stage"] >= 1 else 1
        optimizer = 0.0 if offloads(self._zero, "optimizer") else _ADAM_BYTES * self._trained() / owners / GIB
        parts = {**self._weights(copies=1 + copy), "optimizer": optimizer}
        tokens = config.steps * self.config.train.batch_size * one.block_tokens
        return [self._phase("transfer", parts, one, tokens=tokens, gathers=3 if config.has_teacher else 2)]

    def _learning(self, learns: Any) -> Pass:
        train = self.config.train
        return Pass(
            batch=max(1, train.batch_size // (self.fleet.ranks * train.accumulation)),
            block_tokens=self._block_tokens(self.config.data.block_tokens),
            learns=learns,
            checkpointing=train.activation_checkpointing,
        )

    def _trained(self) -> int:
        kept = self.shape.num_layers - (self.num_drop if self.config.stage2.gates == "off" else 0)
        if self.config.stage2.trainable == "full":
            return self.shape.num_parameters - (self.shape.num_layers - kept) * max(self.shape.layer_parameters)
        if self.config.stage2.trainable == "none":
            return 0
        return kept * self.config.stage2.lora.rank * self.shape.adapter_width


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """For printing and JSON."""
    fleet = estimate.fleet
    phases = [
        {
            "name": phase.name,
            "memory_gib": {part: round(gib, 3) for part, gib in phase.memory_gib.items()},
            "total_gib": round(phase.total_gib, 3),
            "tokens": phase.tokens,
            "seconds": round(phase.seconds(fleet), 1),
            "tokens_per_s": round(phase.tokens / max(phase.seconds(fleet), 1e-9)),
            "traffic_gb_per_pass": round(phase.traffic_gb, 3),
        }
        for phase in estimate.phases
    ]
    return {
        "model": estimate.shape.name,
        "parameters": estimate.shape.num_parameters,
        "num_layers": estimate.shape.num_layers,
        "num_drop": estimate.num_drop,
        "bound": bound_of(estimate.config.prune),
        "nodes": fleet.nodes,
        "gpus_per_node": fleet.gpus,
        "gpu": fleet.gpu.model_dump(),
        "phases": phases,
        "peak_gib": round(estimate.peak_gib, 3),
        "fits": estimate.fits,
        "remedy": estimate.remedy(),
        "seconds": round(sum(phase.seconds(fleet) for phase in estimate.phases), 1),
        "disk_gib": round(estimate.disk_gib, 3),
    }

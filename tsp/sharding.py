"""Read a DeepSpeed JSON, fill its `auto` values from the job's config, and refuse what contradicts it.

The JSON says how to shard; batch, accumulation, clipping, dtype and optimizer have their master in the config. All
contradictions are reported at once. No DeepSpeed is imported here.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsp.config import JobConfig, flatten, nest
from tsp.errors import ConfigError

_OWNED_ELSEWHERE = ("optimizer", "scheduler")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The optimizer of the trainable parameters."""

    weight_decay: float = 0.0
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Instead of an optimizer: no step is taken, `Engine.gradient` reads the mean over the micro-batches."""

    num_micro_batches: int
    """Of each rank; `Mounted.end_micro_batch` between two of them, and not after the last."""


def read_json(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed JSON.

    Raises:
        ConfigError: missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--ds {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--ds {path}: no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--ds {path}: must be an object, got {type(content).__name__}")
    return content


def resolve(
    content: Mapping[str, Any], config: JobConfig, *, world_size: int, hidden_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The DeepSpeed config of this job, with every `auto` filled.

    Args:
        content: the JSON.
        config: the job's.
        world_size: ranks.
        hidden_size: of the model; sizes the ZeRO-3 buckets that are `auto`.
        dtype: of the weights in memory.

    Raises:
        ConfigError: batch not divisible, or the JSON contradicts the config; all contradictions in one message.
    """
    batch, accumulation = config.train.batch_size, config.train.accumulation
    micro_batch, remainder = divmod(batch, world_size * accumulation)
    if remainder or not micro_batch:
        raise ConfigError(
            f"train.batch_size must be a multiple of ranks x accumulation = {world_size} x {accumulation}, got {batch}"
        )
    ours: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "bf16.enabled": dtype == torch.bfloat16,
        "fp16.enabled": False,
    }
    # The sizes that transformers' Trainer gives these (transformers.integrations.deepspeed).
    sizes = {
        "zero_optimization.reduce_bucket_size": hidden_size**2,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "gradient_clipping": config.stage2.clip or 0.0,
    }
    theirs = flatten(content)
    faults = [
        f"{key} is {theirs[key]!r}, the job has {value!r}"
        for key, value in ours.items()
        if theirs.get(key, "auto") not in ("auto", value)
    ]
    if theirs.get("gradient_clipping", "auto") not in ("auto", sizes["gradient_clipping"]):
        faults.append(f"gradient_clipping is {theirs['gradient_clipping']!r}, stage2.clip is {config.stage2.clip!r}")
    faults += [f"{key} belongs in the config (stage2.*), remove it" for key in _OWNED_ELSEWHERE if key in content]
    known = ours | sizes
    faults += [f"{key} cannot be 'auto'" for key, value in theirs.items() if value == "auto" and key not in known]
    sections = sorted({key.partition(".")[0] for key in known if "." in key})
    faults += [f"{key} must be an object" for key in sections if not isinstance(content.get(key, {}), Mapping)]
    if theirs.get("zero_optimization.stage") not in (0, 1, 2, 3):
        faults.append("zero_optimization.stage must be 0, 1, 2 or 3")
    if faults:
        raise ConfigError(f"--ds: {'; '.join(faults)}")
    filled = {key: known[key] if value == "auto" else value for key, value in theirs.items()}
    resolved: dict[str, Any] = {}
    for key, value in (filled | ours).items():
        _put(resolved, nest(key, value))
    return resolved


def with_optimizer(sharding: Mapping[str, Any], optimizer: AdamW | Gradients | None, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of one mounting of the model.

    Args:
        sharding: from `resolve`.
        optimizer: of the trainable parameters; None: there are none.
        world_size: ranks.
    """
    config = copy.deepcopy(dict(sharding))
    if isinstance(optimizer, AdamW):
        # The learning rate is set at each step.
        parameters = {"lr": 0.0, "betas": list(optimizer.betas), "weight_decay": optimizer.weight_decay}
        offloaded = offloads(config["zero_optimization"], "optimizer")
        config["optimizer"] = {"type": "AdamW", "params": parameters | ({} if offloaded else {"torch_adam": True})}
        config["gradient_clipping"] = optimizer.clip or 0.0
    elif isinstance(optimizer, Gradients):
        # The optimizer without a state; DeepSpeed wants to be told that this is meant.
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.0}}
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        config["gradient_accumulation_steps"] = optimizer.num_micro_batches
        per_step = optimizer.num_micro_batches * world_size
        config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * per_step
    return config


def offloads(zero: Mapping[str, Any], part: str) -> bool:
    """Whether `zero_optimization` keeps a part in host memory or on a disk; templates often say `"device": "none"`.

    Args:
        zero: that section.
        part: `optimizer` or `param`.
    """
    settings = zero.get(f"offload_{part}")
    return isinstance(settings, Mapping) and settings.get("device") in ("cpu", "nvme")


def _put(tree: dict[str, Any], branch: Mapping[str, Any]) -> None:
    for key, value in branch.items():
        if isinstance(value, Mapping):
            _put(tree.setdefault(key, {}), value)
        else:
            tree[key] = value

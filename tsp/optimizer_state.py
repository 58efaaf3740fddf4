"""What DeepSpeed's AdamW holds of each trained parameter, whole and by name, whatever the ZeRO stage and the ranks.

tensors = whole_state(engine, named)              # one parameter at a time; the same call on every rank
set_whole_state(engine, named, tensors, gathered)

DeepSpeed's own checkpoints are pickles, one a rank, and ask for the same number of ranks under ZeRO-3.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT = "weight"
STEP = "step"
"""The name of AdamW's own count of steps, `[]` fp32."""


def whole_state(engine: Any, named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """fp32 master weight and moments of each parameter, its shape; after at least one step.

    Args:
        engine: DeepSpeed's.
        named: the trained parameters, in the same order on every rank.
    """
    for name, parameter in named:
        for part in (_WEIGHT, *_MOMENTS):
            yield f"{part}.{name}", _get(engine, parameter, None if part == _WEIGHT else part).clone()
    yield STEP, torch.tensor(_steps(engine), dtype=torch.float32)


def set_whole_state(
    engine: Any,
    named: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
    gathered: Callable[..., AbstractContextManager[None]],
) -> None:
    """Put all of it back, where the optimizer has taken a step already, one at learning rate 0: only then is it made.

    Args:
        engine: DeepSpeed's.
        named: as for `whole_state`.
        tensors: from `whole_state`; asked for on every rank alike, each once.
        gathered: `Engine.gathered`.
    """
    for name, parameter in named:
        if f"{_WEIGHT}.{name}" not in tensors:
            continue  # Of a layer that is closed by now.
        weight = tensors[f"{_WEIGHT}.{name}"].to(parameter.device)
        _set(engine, parameter, weight, None)
        for part in _MOMENTS:
            _set(engine, parameter, tensors[f"{part}.{name}"].to(parameter.device), part)
        # What the model computes with follows from the master weight at the next step only.
        with torch.no_grad(), gathered([parameter], modify=True):
            parameter.copy_(weight)
    steps = int(tensors[STEP])
    for holder in _counters(engine):
        if torch.is_tensor(holder[STEP]):
            holder[STEP].fill_(steps)
        else:
            holder[STEP] = steps


def let_go(model: nn.Module) -> None:
    """DeepSpeed 0.19 leaves its optimizer on the parameters, and with it 16 bytes for each that was trained."""
    for parameter in model.parameters():
        for name in ("_z3_optimizer", "_zero_optimizer", "_hp_mapping"):
            vars(parameter).pop(name, None)


def set_adam(optimizer: torch.optim.Adam, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    """Put back what torch's Adam holds of one parameter that is the same on every rank: a gate vector."""
    # Its count stays on the CPU.
    optimizer.state[parameter] = {
        key: value.clone() if key == STEP else value.to(parameter.device, copy=True) for key, value in state.items()
    }


def _get(engine: Any, parameter: Any, key: str | None) -> Tensor:
    if hasattr(parameter, "ds_id"):  # ZeRO-3.
        return parameter._z3_optimizer.get_full_hp_param(parameter, key)
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2.
        return parameter.get_full_hp_param(key)
    return _unsharded(engine, parameter, key)


def _set(engine: Any, parameter: Any, value: Tensor, key: str | None) -> None:
    if hasattr(parameter, "ds_id"):
        held = parameter._z3_optimizer.get_local_fp32_param(parameter, key)
        # The last rank's part is filled up where the ranks do not divide the parameter; DeepSpeed's setter for the
        # whole forgets that.
        mine = torch.zeros_like(held)
        start = held.numel() * torch.distributed.get_rank()
        part = value.flatten()[start : start + held.numel()]
        mine[: part.numel()].copy_(part)
        parameter._z3_optimizer.set_local_hp_param(mine, parameter, key)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value, key)
    else:
        _unsharded(engine, parameter, key).copy_(value)


def _unsharded(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    """Without ZeRO the optimizer has the parameter itself, or a copy of it in fp32."""
    optimizer = engine.optimizer
    groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True)
    copies = (copy for lows, highs in groups for low, copy in zip(lows, highs, strict=True) if low is parameter)
    master = next(copies, parameter)
    return master.detach() if key is None else engine.basic_optimizer.state[master][key]


def _steps(engine: Any) -> int:
    return next(int(holder[STEP]) for holder in _counters(engine))


def _counters(engine: Any) -> Iterator[dict[str, Any]]:
    """Where the optimizer counts: in each state, or in each group of parameters."""
    optimizer = engine.basic_optimizer
    for holder in (*optimizer.state.values(), *optimizer.param_groups):
        if STEP in holder:
            yield holder

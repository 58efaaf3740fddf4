"""Gates and gap recorders on the layers of a decoder: attached as forward hooks, detached without a trace.

The gates are one fp32 tensor `[L]` beside the model, the same on every rank, and not a parameter of it. So sharding,
mixed precision and the engine's optimizer leave them alone, and a method updates them with plain arithmetic:

    gates = Gates(decoder)
    with gates.attached():
        loss(model(...)).backward()      # gates.values.grad is [L] fp32
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsp.decoder import Decoder, hidden_in, hidden_out, with_hidden

Placement = Literal["residual", "output"]


class Gates:
    """One gate per layer.

    Args:
        decoder: the layers to gate.
        placement: `residual`: the layer emits x_in + g * f(x_in), g = 0 is removal; `output` (paper): g * x_out.
        gated: the layers that are multiplied at all; None: every one.
        recorded: the layers whose gap is kept in `gaps` at each forward pass.
    """

    def __init__(
        self,
        decoder: Decoder,
        placement: Placement = "residual",
        *,
        gated: Collection[int] | None = None,
        recorded: Collection[int] = (),
    ) -> None:
        device = next(decoder.model.parameters()).device
        self.decoder = decoder
        self.placement = placement
        self.values = torch.ones(decoder.num_layers, dtype=torch.float32, device=device)
        self.gaps: dict[int, Tensor] = {}
        """Emitted minus received hidden state, `[B, T, D]`, of the last forward: what the drop would lose."""
        self._gated = frozenset(range(decoder.num_layers) if gated is None else gated)
        self._recorded = frozenset(recorded)
        self._open = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the layers for the length of a block."""
        hooked = sorted(self._gated | self._recorded)
        handles = [
            self.decoder.layers[index].register_forward_hook(self._hook(index), with_kwargs=True) for index in hooked
        ]
        try:
            yield
        finally:
            self.gaps.clear()
            for handle in handles:
                handle.remove()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """All gates at 1 and nothing recorded for the length of a block: the dense model, for a teacher's forward."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def readable(self) -> list[float]:
        """The `[L]` values as floats, 0 for bypassed layers."""
        bypassed = self.decoder.bypassed
        return [0.0 if index in bypassed else value for index, value in enumerate(self.values.detach().tolist())]

    def _hook(self, index: int) -> Any:
        def gate(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self._open or index in self.decoder.bypassed:
                return None
            x_in, x_out = hidden_in(args, kwargs), hidden_out(output)
            emitted = self._gate(x_in, x_out, self.values[index]) if index in self._gated else x_out
            if index in self._recorded:
                self.gaps[index] = emitted - x_in
            return with_hidden(output, emitted)

        return gate

    def _gate(self, x_in: Tensor, x_out: Tensor, gate: Tensor) -> Tensor:
        """In fp32, for in bf16 a change of the gate below 1/512 would be lost; exact at 0 and 1."""
        if self.placement == "output":
            return (gate * x_out.float()).to(x_out.dtype)
        emitted: Tensor = _Lerp.apply(x_in, x_out, gate)
        return emitted


class _Lerp(torch.autograd.Function):
    """`torch.lerp` in fp32 that keeps its inputs for the backward pass in their own dtype.

    In bf16 autograd would keep two fp32 copies of the hidden state for each layer, 8 bytes per feature and token
    where 4 do: at the width of a 7B model a fifth of all activations, under activation checkpointing most of them.
    """

    @staticmethod
    def forward(ctx: Any, x_in: Tensor, x_out: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x_in, x_out, gate)
        return torch.lerp(x_in.float(), x_out.float(), gate).to(x_out.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_in, x_out, gate = ctx.saved_tensors
        of_in, of_out, of_gate = ctx.needs_input_grad
        slope = gradient.float()
        return (
            (slope * (1 - gate)).to(x_in.dtype) if of_in else None,
            (slope * gate).to(x_out.dtype) if of_out else None,
            (slope * (x_out.float() - x_in.float())).sum() if of_gate else None,
        )

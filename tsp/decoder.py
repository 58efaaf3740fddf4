"""Find and probe the layer stack of any decoder-only model, by structure and without a table of families.

There is exactly one `ModuleList` with as many members as the config has layers, and each member takes the hidden state
first and returns it first (method.md, section 4). What does not fit is refused with the reason. `find_decoder` works on
fake tensors too, so a model of any size is checked before its weights are read.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsp.errors import ModelError


@dataclass(frozen=True)
class Decoder:
    """A model and its layer stack."""

    model: nn.Module
    path: str
    """Dotted name of the stack, e.g. `model.layers`."""
    num_outputs: int | None
    """Length of the tuple a layer returns; None: it returns the hidden state alone."""

    @property
    def layers(self) -> nn.ModuleList:
        stack = self.model.get_submodule(self.path)
        assert isinstance(stack, nn.ModuleList)
        return stack

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def bypass(self, indices: Collection[int]) -> None:
        """Let exactly these layers hand their input on, without computing (or gathering) anything."""
        for index, layer in enumerate(self.layers):
            if index in indices:
                layer.forward = self._hand_on
            elif "forward" in vars(layer):
                del layer.forward

    @property
    def bypassed(self) -> frozenset[int]:
        """The layers that are bypassed now."""
        return frozenset(index for index, layer in enumerate(self.layers) if "forward" in vars(layer))

    @contextmanager
    def bypassing(self, indices: Collection[int]) -> Iterator[None]:
        """`bypass` for the length of a block."""
        before = self.bypassed
        self.bypass(indices)
        try:
            yield
        finally:
            self.bypass(before)

    @contextmanager
    def leaving_out_each(self, indices: Sequence[int], states: Sequence[Tensor]) -> Iterator[None]:
        """For the length of a block a pass over F times the same tokens leaves out one of F layers in each repetition.

        Nothing is computed up to the first of them. The model's own forward still makes masks and positions, and runs
        the other layers, the norm and the head; under ZeRO-3 it gathers each once for all F.

        Args:
            indices: the F layers, ascending.
            states: `hidden_states` of an earlier pass over the tokens, once.
        """
        first, *others = indices
        hidden = torch.cat([states[first], *[states[first + 1]] * len(others)])

        def hand_on(rows: slice) -> Any:
            def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                returned = hidden_out(output).clone()
                returned[rows] = hidden_in(args, kwargs)[rows]
                return with_hidden(output, returned)

            return hook

        num_rows = len(states[first])
        hooks = [
            self.layers[index].register_forward_hook(
                hand_on(slice(number * num_rows, (number + 1) * num_rows)), with_kwargs=True
            )
            for number, index in enumerate(others, start=1)
        ]
        try:
            with self.bypassing(self.bypassed.union(range(first + 1))):
                self.layers[first].forward = lambda *args, **kwargs: self._returned(hidden)
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def hidden_states(self, wanted: bool = True) -> Iterator[list[Tensor]]:
        """Collects h_0 ... h_L of the one forward pass inside the block, `[B, T, D]` each.

        h_i is what layer i is called with; h_L is what the last layer returns, before the final norm.

        Args:
            wanted: else there are none, and none are held.
        """
        states: list[Tensor] = []
        if not wanted:
            yield states
            return

        def note_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            states.append(hidden_in(args, kwargs))

        def note_output(module: nn.Module, args: Any, output: Any) -> None:
            states.append(hidden_out(output))

        hooks = [layer.register_forward_pre_hook(note_input, with_kwargs=True) for layer in self.layers]
        hooks.append(self.layers[-1].register_forward_hook(note_output))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def _hand_on(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        return self._returned(hidden_in(args, kwargs))

    def _returned(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        return hidden if self.num_outputs is None else (hidden, *[None] * (self.num_outputs - 1))


def find_decoder(model: nn.Module) -> Decoder:
    """Find the stack and prove with a tiny forward that each layer is called once, in order, as we expect.

    Args:
        model: a causal language model of transformers, on any device, fake, whole or in ZeRO-3 shards.

    Raises:
        ModelError: no stack, several, or one that behaves otherwise.
    """
    config: Any = model.config
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    stacks = [name for name, module in model.named_modules() if _is_stack(module, num_layers)]
    # An image encoder may have as many layers; text does not run through it.
    calls = {name: _calls(model, model.get_submodule(name)) for name in stacks}
    used = [name for name in stacks if calls[name]] or stacks
    if len(used) != 1:
        found = ", ".join(used) or "none"
        raise ModelError(f"the model must have exactly one list of {num_layers} layers, found: {found}")
    return Decoder(model, used[0], _num_outputs(calls[used[0]], num_layers))


def read_by_others(decoder: Decoder) -> frozenset[int]:
    """Layers that later ones read beside the hidden state (shared keys and values): they cannot be bypassed alone.

    Works on fake tensors. Of any two layers one is bypassed and the other is not for some bit of their indices, so
    2 log2(L) forward passes show whether there are such layers at all; only then each is tried alone.
    """
    indices = range(decoder.num_layers)
    halves = [
        [i for i in indices if i >> bit & 1 == side] for bit in range(len(indices).bit_length()) for side in (0, 1)
    ]
    if all(_runs_without(decoder, half) for half in halves):
        return frozenset()
    return frozenset(index for index in indices if not _runs_without(decoder, [index]))


def _runs_without(decoder: Decoder, bypassed: Collection[int]) -> bool:
    device = next(decoder.model.parameters()).device
    try:
        with torch.no_grad(), decoder.bypassing(bypassed):
            decoder.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError):
        return False
    return True


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state `[B, T, D]` that a layer was called with."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_out(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The hidden state `[B, T, D]` that a layer returned."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Tensor | tuple[Any, ...], hidden: Tensor) -> Tensor | tuple[Any, ...]:
    """The same output with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _is_stack(module: nn.Module, num_layers: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == num_layers


def _calls(model: nn.Module, layers: nn.Module) -> list[tuple[int, Any]]:
    """What a tiny forward does with the layers, in its order: index, and length of the output tuple or None."""
    calls: list[tuple[int, Any]] = []
    hooks = []
    for index, layer in enumerate(layers.children()):

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            takes_hidden = bool(args) or "hidden_states" in kwargs
            returned = hidden_out(output)
            fits = takes_hidden and isinstance(returned, Tensor) and returned.shape == hidden_in(args, kwargs).shape
            calls.append((index, len(output) if isinstance(output, tuple) else None) if fits else (index, "misfit"))

        hooks.append(layer.register_forward_hook(note, with_kwargs=True))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return calls


def _num_outputs(calls: list[tuple[int, Any]], num_layers: int) -> int | None:
    if [index for index, _ in calls] != list(range(num_layers)):
        raise ModelError(f"the layers must each be called once, in order; got the calls {[i for i, _ in calls]}")
    kinds = {kind for _, kind in calls}
    if "misfit" in kinds or len(kinds) != 1:
        raise ModelError("each layer must take the hidden state first and return one of the same shape first")
    return kinds.pop()

"""A model that can run and train; `engine.Engine.mounted` makes it."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from tsp.optimizer_state import set_whole_state, whole_state
from tsp.targets import token_ids


class Mounted:
    """A model that can run; call it with tokens `[B, T]` int64 for logits `[B, T, V]`."""

    def __init__(self, model: nn.Module, engine: Any, accumulation: int) -> None:
        self.model = model
        self._engine = engine
        self._accumulation = accumulation
        self._apart: Any = None

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        return self._forward(tokens_BT).logits

    def run(self, tokens_BT: Tensor) -> None:
        """A pass for what hooks see of it: of the logits only the last ones are computed, as far as the model can."""
        fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        self._forward(tokens_BT, **fewer)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """For passes that take turns with others and run other modules: a teacher's beside a student's.

        ZeRO-3 gathers ahead by the order of the modules in the pass before. Passes of two orders would make it forget
        each other's every time, and each gather be waited for; those inside the block have an order of their own.
        """
        offload = getattr(getattr(self._engine, "optimizer", None), "parameter_offload", None)
        if offload is None:
            yield
            return
        if self._apart is None:
            self._apart = copy.copy(offload.param_coordinator)
            self._apart._clear_trace_structures()
        outside, offload.param_coordinator = offload.param_coordinator, self._apart
        try:
            yield
        finally:
            offload.param_coordinator = outside

    def _forward(self, tokens_BT: Tensor, **options: Any) -> Any:
        # Without an optimizer DeepSpeed's own forward forbids a backward; its ZeRO-3 hooks sit on the module.
        runner = self._engine or self.model
        return runner(input_ids=token_ids(tokens_BT), use_cache=False, **options)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's mean loss; the gradients of a step's micro-batches are averaged."""
        if self._engine is not None:
            self._engine.backward(loss)
        elif loss.requires_grad:
            (loss / self._accumulation).backward()

    def end_micro_batch(self) -> None:
        """After each backward; at the last micro-batch of a step DeepSpeed's optimizer steps."""
        if self._engine is not None:
            self._engine.step()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the step that follows."""
        if self._engine is not None:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = lr

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained and its optimizer's state by name, whole (`optimizer_state.py`); behind a step."""
        named = self._trained()
        return whole_state(self._engine, named) if named else iter(())

    def set_state(self, tensors: Mapping[str, Tensor], gathered: Callable[..., AbstractContextManager[None]]) -> None:
        """Put it back, behind a step at learning rate 0.

        Args:
            tensors: from `state`.
            gathered: `Engine.gathered`.
        """
        set_whole_state(self._engine, self._trained(), tensors, gathered)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def release(self) -> None:
        """After a backward pass ZeRO-3 holds whole what is nearest to the input; it goes back into shards."""
        if self._engine is not None:
            self._engine.empty_partition_cache()

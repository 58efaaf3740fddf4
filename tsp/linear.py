"""Linear maps as transformers has them: torch's `Linear`, and GPT-2's `Conv1D`, whose weight is the other way round."""

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_maps(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps in a module, with their dotted names."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | Conv1D):
            yield name, part


def num_outputs(linear: nn.Module) -> int:
    """Features that come out; also where the weight is in shards."""
    outputs = linear.nf if isinstance(linear, Conv1D) else linear.out_features
    assert isinstance(outputs, int)
    return outputs


def outputs_first(linear: nn.Module) -> bool:
    """Whether the weight is `[outputs, inputs]`."""
    return not isinstance(linear, Conv1D)

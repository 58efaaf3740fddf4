"""Low-rank adapters on the linear maps of some layers: put in, switched off for the teacher, merged, taken out."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tsp.checkpoint import Gather
from tsp.decoder import Decoder
from tsp.errors import ModelError
from tsp.linear import linear_maps
from tsp.settings import LoraConfig as LoraSettings


def add_adapters(decoder: Decoder, layers: Iterable[int], settings: LoraSettings, dtype: torch.dtype) -> None:
    """Put trainable adapters on every linear map of the given layers; all else stays frozen.

    Args:
        decoder: frozen, whole or in ZeRO-3 shards.
        layers: indices that get adapters.
        settings: rank and scale.
        dtype: of the adapters; DeepSpeed demands one dtype for all parameters and keeps fp32 masters of its own.
    """
    targets = [f"{decoder.path}.{index}.{name}" for index in layers for name, _ in linear_maps(decoder.layers[index])]
    if not targets:
        raise ModelError("the layers have no linear maps for adapters; set stage2.trainable=full")
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(lora, decoder.model)
    for layer in _adapted(decoder.model).values():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The dense model for the length of a block."""
    adapted = list(_adapted(model).values())
    for layer in adapted:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in adapted:
            layer._disable_adapters = False


def merge_adapters(model: nn.Module, gathered: Gather) -> Collection[nn.Parameter]:
    """Add the adapters to the weights, one map at a time, and take them out.

    Returns:
        The weights that changed.
    """
    adapted = list(_adapted(model).values())
    for layer in adapted:
        with gathered(list(layer.parameters()), modify=True):
            layer.merge()
    remove_adapters(model)
    return [layer.get_base_layer().weight for layer in adapted]


def remove_adapters(model: nn.Module) -> None:
    """Take the adapters out, merged or not."""
    for name, layer in _adapted(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _adapted(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

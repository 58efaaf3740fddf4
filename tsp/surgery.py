"""Drop layers from a checkpoint's names and config: renumber tensors, slice and remap what the config says per layer.

Works on names and on the config's own dictionary, so a model of any size is handled without building it. What the rules
here do not know is found by `check_kinds`: a layer that would become another kind of layer is refused, with the reason.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from tsp.errors import ModelError

# Names of config fields that hold indices of layers rather than one entry per layer.
_INDEX_LIST = re.compile(r".*_(layers|idxs|indexes|indices|layer_ids)$")
# Names of config fields that hold token ids: such a list may be as long as the stack by chance.
_TOKEN_IDS = re.compile(r".*_token_ids?$")
# Names of a module's settings that point at a layer: at its own, or at one whose keys and values it shares.
_POINTER = re.compile(r"(^|.*_)(idx|index|id|number)$")

Kind = Mapping[str, Any]
# Takes the dense model's text config, the mended one, and the kept layers; changes the mended one.
_Mend = Callable[[Any, Any, Sequence[int]], None]


def kept_layers(num_layers: int, dropped: Collection[int]) -> list[int]:
    """The remaining indices, ascending.

    Raises:
        ModelError: indices out of range or repeated, or nothing would be left.
    """
    wrong = sorted(index for index in dropped if not 0 <= index < num_layers)
    if wrong or len(set(dropped)) != len(dropped) or len(dropped) >= num_layers:
        raise ModelError(
            f"layers to drop must be distinct, in [0, {num_layers - 1}] and fewer than {num_layers}, "
            f"got {','.join(map(str, dropped))}"
        )
    return [index for index in range(num_layers) if index not in set(dropped)]


def renamed(name: str, stack: str, kept: Sequence[int]) -> str | None:
    """The name of a tensor after the drop; None if it goes.

    Args:
        name: e.g. `model.layers.7.mlp.up_proj.weight`.
        stack: path of the layer stack, e.g. `model.layers`.
        kept: the remaining layers, ascending.
    """
    prefix = stack + "."
    if not name.startswith(prefix):
        return name
    number, dot, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{list(kept).index(int(number))}{dot}{rest}" if int(number) in kept else None


def mended_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of the config that describes the model without the dropped layers.

    Args:
        config: of the dense model.
        kept: the remaining layers, ascending.

    Raises:
        ModelError: a field gives the kind of a layer by its position, and cannot express the result.
    """
    mended = copy.deepcopy(config)
    dense, text = config.get_text_config(decoder=True), mended.get_text_config(decoder=True)
    num_layers = dense.num_hidden_layers
    if list(kept) == list(range(num_layers)):
        return mended
    for field, value in list(vars(text).items()):
        if not isinstance(value, list | tuple) or field.startswith("_") or _TOKEN_IDS.match(field):
            continue
        indices = _INDEX_LIST.match(field) and all(isinstance(index, int) for index in value)
        # One as long as the stack holds indices only if it names every layer.
        if len(value) == num_layers and not (indices and set(value) == set(range(num_layers))):
            setattr(text, field, [value[index] for index in kept])
        elif indices:
            setattr(text, field, [kept.index(index) for index in value if index in kept])
    for field, mend in _MENDS.items():
        if getattr(dense, field, None):
            mend(dense, text, kept)
    text.num_hidden_layers = len(kept)
    overrides = dense.to_dict().get("per_layer_config")
    if overrides:
        text.per_layer_config = {new: overrides[str(old)] for new, old in enumerate(kept) if str(old) in overrides}
    return mended


def layer_kinds(layers: Iterable[nn.Module]) -> list[Kind]:
    """What makes each layer the kind it is: the classes, sizes and settings of its modules.

    Args:
        layers: of a model on any device, fake tensors too.

    Returns:
        One mapping a layer: `self_attn` -> class, `self_attn.sliding_window` -> 4096, `mlp.gate.weight` -> shape.
    """
    return [dict(_settings(layer)) for layer in layers]


def check_kinds(dense: Sequence[Kind], pruned: Sequence[Kind], kept: Sequence[int]) -> None:
    """Every kept layer is still the kind of layer it was.

    Args:
        dense: `layer_kinds` of the dense model.
        pruned: of the model that the mended config describes.
        kept: the remaining layers, ascending.

    Raises:
        ModelError: one is not; loading would leave its weights out, or run it otherwise.
    """
    if len(pruned) != len(kept):
        raise ModelError(f"the config counts its layers twice: that of {len(kept)} makes a model of {len(pruned)}")
    for new, old in enumerate(kept):
        before, after = dense[old], pruned[new]
        for name in sorted({*before, *after}):
            was, would_be = before.get(name), after.get(name)
            if was != would_be and not _points_at_the_same(name, was, would_be, kept):
                raise ModelError(
                    f"layer {old} cannot become layer {new}: its {name or 'class'} is {was!r} and would be "
                    f"{would_be!r}, as the config gives layers their kind by position; drop other layers"
                )


def other_shapes(model: nn.Module, stack: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside of the stack, by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith(f"{stack}.")}


def check_other_shapes(dense: Mapping[str, tuple[int, ...]], pruned: Mapping[str, tuple[int, ...]]) -> None:
    """Nothing outside of the stack has a part for each layer.

    Raises:
        ModelError: something has (embeddings per layer, say), and would have to be cut too.
    """
    changed = sorted(name for name in {*dense, *pruned} if dense.get(name) != pruned.get(name))
    if changed:
        raise ModelError(
            f"{changed[0]} is {dense.get(changed[0])} and would be {pruned.get(changed[0])}: it has a part for each "
            "layer outside of the stack, which is not supported"
        )


def _settings(layer: nn.Module) -> Iterable[tuple[str, Any]]:
    for path, module in layer.named_modules():
        dot = f"{path}." if path else ""
        yield path, type(module).__name__
        for name, value in vars(module).items():
            if name != "training" and not name.startswith("_") and isinstance(value, int | float | str | None):
                yield dot + name, value
        for name, parameter in module.named_parameters(recurse=False):
            yield dot + name, tuple(parameter.shape)


def _points_at_the_same(name: str, was: Any, would_be: Any, kept: Sequence[int]) -> bool:
    pointer = _POINTER.match(name.rpartition(".")[2])
    return bool(pointer) and isinstance(was, int) and was in kept and kept.index(was) == would_be


def _first(field: str) -> _Mend:
    """The first `field` layers are of one kind: count those that are left of them."""

    def mend(dense: Any, text: Any, kept: Sequence[int]) -> None:
        setattr(text, field, sum(index < getattr(dense, field) for index in kept))

    return mend


def _last(field: str) -> _Mend:
    """The last `field` layers are of one kind."""

    def mend(dense: Any, text: Any, kept: Sequence[int]) -> None:
        border = dense.num_hidden_layers - getattr(dense, field)
        setattr(text, field, sum(index >= border for index in kept))

    return mend


def _every(period: str, offset: str) -> _Mend:
    """Layers with index % period == offset are of one kind: look for another pair that says the same of the kept."""

    def mend(dense: Any, text: Any, kept: Sequence[int]) -> None:
        special = [index % getattr(dense, period) == getattr(dense, offset) for index in kept]
        for step in range(1, len(kept) + 2):
            for start in range(step):
                if [new % step == start for new in range(len(kept))] == special:
                    setattr(text, period, step)
                    setattr(text, offset, start)
                    return
        raise ModelError(
            f"config.{period} = {getattr(dense, period)} makes every such layer another kind; after the drop these "
            f"would be layers {[new for new, one in enumerate(special) if one]}, which no period expresses; "
            "drop other layers"
        )

    return mend


def _sparse_step(dense: Any, text: Any, kept: Sequence[int]) -> None:
    """A layer is sparse if (index + 1) % step == 0 and it is not listed as dense: list all that are dense."""
    listed, step = dense.mlp_only_layers or [], dense.decoder_sparse_step
    text.mlp_only_layers = [new for new, index in enumerate(kept) if index in listed or (index + 1) % step]
    text.decoder_sparse_step = 1


def _runs(dense: Any, text: Any, kept: Sequence[int]) -> None:
    """`attention_types` is a run-length form of `attention_layers`, which it decides."""
    text.attention_types = [[[dense.attention_layers[index]], 1] for index in kept]


def _block_types(dense: Any, text: Any, kept: Sequence[int]) -> None:
    """A pattern that is repeated over the stack: write it out."""
    pattern = dense.block_types
    text.block_types = [pattern[index % len(pattern)] for index in kept]


def _moe_range(dense: Any, text: Any, kept: Sequence[int]) -> None:
    """Layers from start to end (-1: the last) are mixtures of experts; with an interval, `check_kinds` decides."""
    end = dense.moe_layer_end_index
    last = dense.num_hidden_layers - 1 if end == -1 else end
    text.moe_layer_start_index = sum(index < dense.moe_layer_start_index for index in kept)
    text.moe_layer_end_index = sum(index <= last for index in kept) - 1


def _count(field: str) -> _Mend:
    """A second name for the number of layers, if it is that number."""

    def mend(dense: Any, text: Any, kept: Sequence[int]) -> None:
        if getattr(dense, field) == dense.num_hidden_layers:
            setattr(text, field, len(kept))

    return mend


def _never(field: str) -> _Mend:
    """The layer computes with its index."""

    def mend(dense: Any, text: Any, kept: Sequence[int]) -> None:
        raise ModelError(f"config.{field} makes each layer depend on its position; such a model cannot lose layers")

    return mend


# Fields by which a family derives the kind of a layer from its index without a list, where they say anything.
_MENDS: Mapping[str, _Mend] = {
    "num_blocks": _count("num_blocks"),
    "first_k_dense_replace": _first("first_k_dense_replace"),
    "num_dense_layers": _first("num_dense_layers"),
    "num_kv_shared_layers": _last("num_kv_shared_layers"),
    "attn_layer_period": _every("attn_layer_period", "attn_layer_offset"),
    "expert_layer_period": _every("expert_layer_period", "expert_layer_offset"),
    "decoder_sparse_step": _sparse_step,
    "attention_types": _runs,
    "block_types": _block_types,
    "moe_layer_end_index": _moe_range,
    "scale_attn_by_inverse_layer_idx": _never("scale_attn_by_inverse_layer_idx"),
}

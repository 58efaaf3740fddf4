"""Drop layers from a checkpoint's names and config: renumber tensors, slice and remap what the config says per layer.

Works on names and on the config's own dictionary, so a model of any size is handled without building it.
"""

import copy
import re
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PretrainedConfig

from tsp.errors import ModelError

# Names of config fields that hold indices of layers rather than one entry per layer.
_INDEX_LIST = re.compile(r".*_(layers|idxs|indexes|indices|layer_ids)$")
# Names of config fields that hold token ids: such a list may be as long as the stack by chance.
_TOKEN_IDS = re.compile(r".*_token_ids?$")

# Counts and moduli by which a family derives the kind of a layer from its index, each with the values under which it
# says nothing. With another value, dropping a layer would silently change the kind of those after it.
_POSITION_RULES: dict[str, tuple[Any, ...]] = {
    "first_k_dense_replace": (None, 0),
    "decoder_sparse_step": (None, 1),
    "num_kv_shared_layers": (None, 0),
    "moe_layer_freq": (None, 1),
    "interleave_moe_layer_step": (None, 1),
    "attn_layer_period": (None, 1),
    "expert_layer_period": (None, 1),
}


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
    text = mended.get_text_config(decoder=True)
    num_layers = text.num_hidden_layers
    for field, harmless in _POSITION_RULES.items():
        if getattr(text, field, None) not in harmless and list(kept) != list(range(num_layers)):
            raise ModelError(
                f"config.{field} = {getattr(text, field)!r} gives layers their kind by position; "
                "dropping layers of such a model is not supported yet"
            )
    for field, value in list(vars(text).items()):
        if not isinstance(value, list | tuple) or field.startswith("_") or _TOKEN_IDS.match(field):
            continue
        if len(value) == num_layers:
            setattr(text, field, [value[index] for index in kept])
        elif _INDEX_LIST.match(field) and all(isinstance(index, int) for index in value):
            setattr(text, field, [kept.index(index) for index in value if index in kept])
    text.num_hidden_layers = len(kept)
    return mended

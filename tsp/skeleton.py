"""Models without their weights: on fake tensors, which have shapes and no data, or with random ones.

with FakeTensorMode():
skeleton = build_skeleton(config, trust=False)
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tsp.masking import one_line


def build_skeleton(config: Any, *, trust: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a config; under `FakeTensorMode` it has shapes and no data, whatever its size.

    Unlike on the meta device, transformers' masks work on fake tensors. In bf16, as torch 2.13 knows the shapes of a
    mixture of experts (`_grouped_mm`) in no other dtype. Not initialised: some initialisations read what they wrote.
    """
    import transformers
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust
        )
    model.tie_weights()
    return model


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """transformers 5.23 takes rows without data for several texts in one, and makes masks that a job does not need."""
    from transformers import masking_utils

    real = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = real


def random_model(config: Any, dtype: torch.dtype, *, trust: bool) -> Any:
    """A frozen model of the config with random weights; under `Engine.loading()` in shards."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trust)
    return model.requires_grad_(False)


def cache_fault(skeleton: Any) -> str | None:
    """Why a model does not run with a key-value cache (one that lost its last attention layer, say); None: it does."""
    try:
        with torch.no_grad():
            skeleton.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        return one_line(error)
    return None

"""`--quantize int8`: a folder's linear maps in 8 bits, saved as a folder, proved, and measured like any other state.

Weights only, by torchao (extra `quantize`): every row of a linear map, which makes one output, is divided by a scale of
its own and rounded to int8; embeddings, output head, norms and what flows through the model keep their dtype. The
folder is one that `from_pretrained` loads where torchao is installed.

Rank 0 does it alone, and holds the whole model: on the CPU to quantise it, on its own device to measure it.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tsp.checkpoint import copy_companions, prove, whole_or_not_at_all
from tsp.config import ModelConfig
from tsp.errors import ConfigError, ModelError
from tsp.evaluation.state import Exam, evaluate_state, prompt_speed
from tsp.masking import one_line
from tsp.records import Evaluation
from tsp.sizes import size_gib
from tsp.skeleton import build_skeleton
from tsp.source import Source, open_source

Value = TypeVar("Value")
# Takes tokens [b, t], returns logits [b, t, V].
Forward = Callable[[Tensor], Tensor]

log = logging.getLogger("tsp")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A state in int8."""

    evaluation: Evaluation
    size_gib: float
    """Of the folder's weights on disk."""
    tokens_per_s_before: float | None
    """Of a prompt, with the folder it was made from, loaded like this one; None: it did not fit, or nobody asked."""


def check_quantizable(source: Source) -> None:
    """There is torchao, and something that it quantises; before the job starts.

    Raises:
        ConfigError: the extra `quantize` is not installed.
        ModelError: the layers have no linear maps (on a fake model, no weights are read).
    """
    from transformers.utils import is_torchao_available

    if source.quantized_by:
        raise ModelError(
            f"--quantize int8 needs a model that is not quantized yet, {source.name} is: {source.quantized_by}"
        )
    if not is_torchao_available():
        raise ConfigError("--quantize int8 needs torchao: pip install 'tsp[quantize]'")
    with FakeTensorMode():
        skeleton = build_skeleton(source.config, trust=source.trust_remote_code)
    if not any(isinstance(module, nn.Linear) for module in skeleton.get_submodule(source.stack).modules()):
        raise ModelError(
            f"--quantize int8 rounds linear maps (torch.nn.Linear), and the layers of {source.name} have none; "
            "leave it out"
        )


def in_int8(
    dense: Path, output: Path, exam: Exam, state: str, *, dtype: torch.dtype, probe: Tensor, trust: bool, keep: bool
) -> Quantized:
    """Quantise a folder and measure what it became; rank 0 only.

    Args:
        dense: the folder to quantise.
        output: folder to make; must not exist.
        exam: what the other states were measured with.
        state: name of this one.
        dtype: of what is not in int8, in memory.
        probe: `[B, T]` int64, to prove it with.
        trust: run the folder's own Python code.
        keep: what was made stays.

    Raises:
        ModelError: it cannot be quantised, or does not fit beside what is there.
    """
    source = _opened(dense, trust)
    folder = quantize(source, output, probe)
    try:
        evaluation = measure(folder, exam, state, dtype)
        before = _speed_before(source, exam, dtype) if exam.config.speed_runs else None
        return Quantized(evaluation=evaluation, size_gib=size_gib(folder), tokens_per_s_before=before)
    finally:
        if not keep:
            shutil.rmtree(output)


def quantize(source: Source, output: Path, tokens_BT: Tensor) -> Source:
    """Write a folder in int8 and prove it: in a fresh process it gives the logits that it gave when it was made.

    Args:
        source: the folder to quantise.
        output: folder to make; must not exist.
        tokens_BT: `[B, T]` int64, to prove it with.

    Returns:
        The folder that was made.

    Raises:
        ModelError: it cannot be quantised or saved, or is not the model that was saved.
    """

    def made() -> Source:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        # torchao reckons in the dtype of the weights: in bf16 one value in twenty goes to the wrong side.
        config = TorchAoConfig(Int8WeightOnlyConfig())
        model = _loaded(source, dtype=torch.float32, quantization_config=config)
        with torch.no_grad():
            logits = model(input_ids=tokens_BT.cpu(), use_cache=False).logits
        with whole_or_not_at_all(output) as folder:
            model.to(source.dtype).save_pretrained(folder)
            del model
            copy_companions(source.folder, folder)
            faults = prove(_opened(folder, source.trust_remote_code), tokens_BT, logits)["faults"]
            if faults:
                raise ModelError(f"saved in int8 {source.name} is not the model that was saved: {'; '.join(faults)}")
        return _opened(output, source.trust_remote_code)

    return _or_model_error(f"{source.name} cannot be quantised", made)


def measure(folder: Source, exam: Exam, state: str, dtype: torch.dtype) -> Evaluation:
    """Load a folder in int8 as a user does, and measure it on this process's device.

    Args:
        folder: from `quantize`.
        exam: what the other states were measured with.
        state: name of this one.
        dtype: of what is not in int8, in memory.

    Raises:
        ModelError: it does not fit beside what is there.
    """
    alone = exam.alone()
    return _with_model(folder, alone, dtype, lambda forward: evaluate_state(alone, forward, state))


def plain_speeds(quantized: Mapping[str, Quantized]) -> dict[str, float | None]:
    """Tokens per second of a prompt by state, in int8 and before, all loaded alike and without shards."""
    before = {"quantized": "dense", "pruned_quantized": "pruned"}
    return {
        **{before[state]: one.tokens_per_s_before for state, one in quantized.items()},
        **{state: one.evaluation.prompt_tokens_per_s for state, one in quantized.items()},
    }


def _speed_before(dense: Source, exam: Exam, dtype: torch.dtype) -> float | None:
    alone = exam.alone()
    try:
        return _with_model(dense, alone, dtype, lambda forward: prompt_speed(alone, forward))
    except ModelError as error:
        log.warning("its speed before int8 is not measured: %s", error)
        return None


def _with_model(folder: Source, exam: Exam, dtype: torch.dtype, measured: Callable[[Forward], Value]) -> Value:
    def made() -> Value:
        model = _loaded(folder, dtype=dtype).to(exam.sharing["device"])
        return measured(lambda tokens_bt: model(input_ids=tokens_bt, use_cache=False).logits)

    return _or_model_error(f"{folder.folder} cannot be measured", made)


def _loaded(source: Source, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code, **options)
    return model.eval().requires_grad_(False)


def _opened(folder: Path, trust: bool) -> Source:
    return open_source(ModelConfig(path=str(folder), trust_remote_code=trust))


@contextmanager
def _torchs_own_linear() -> Iterator[None]:
    """deepspeed 0.19 leaves a linear of its own in torch after ZeRO-3, which can do nothing with int8."""
    replaced = F.linear
    F.linear = torch._C._nn.linear
    try:
        yield
    finally:
        F.linear = replaced


def _or_model_error(what: str, make: Callable[[], Value]) -> Value:
    """Out of memory, and what transformers and torchao have against a model."""
    try:
        with _torchs_own_linear():
            return make()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{what}: {one_line(error)}") from None

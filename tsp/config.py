"""The typed config tree: every number of a job has its one master here, with its default and its range.

`load_config(layers)` merges mappings, later ones win, checks the whole tree and reports all faults in one message.
The layers of a job, weakest first: defaults here, the demo's YAML (no model given), the method's preset, the YAML of
`--config`, the command line's options, `--set`. How weights are sharded is not said here but in `ds_configs/*.json`.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tsp.errors import ConfigError
from tsp.yaml12 import parse_yaml


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(_Section):
    path: str | None = None
    """Hub id, folder, or `models:/name@alias`; None: the embedded demo model."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None: the default branch."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the weights in memory. `auto`: bf16 on a GPU, fp32 on a CPU. Gates are always fp32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class DataConfig(_Section):
    source: str = "stdlib"
    """Calibration text: hub id (`name` or `name:configuration`), file or folder of .txt/.jsonl/.parquet, `stdlib`."""
    block_tokens: int | None = Field(None, ge=2)
    """Tokens per calibration sequence; None: min(2048, the model's positions)."""
    max_blocks: int | None = Field(128, ge=1)
    """Sequences to take from the corpus, evenly spread; None: all. 128 in the paper."""


class EvalConfig(_Section):
    sources: tuple[str, ...] = ()
    """Corpora to measure on; empty: the 10 % of the calibration corpus that are held out."""
    block_tokens: int | None = Field(None, ge=2)
    """Tokens per window; None: min(2048, the model's positions)."""
    max_blocks: int | None = Field(None, ge=1)
    """Windows per corpus, evenly spread; None: all of them, as the field's protocol has it."""
    batch_size: int = Field(8, ge=1)
    """Windows per forward pass and rank."""
    compare_positions: int = Field(4096, ge=0)
    """Positions per corpus at which the dense model's logits stay in host memory, to compare with; 0: no comparison."""
    slices: str | None = None
    """YAML that names parts of the text, each measured by itself, see `tsp/slices.py`; None: none."""
    prompts: int = Field(8, ge=0)
    """Prompts of 32 tokens that are continued greedily, to see whether it still writes; 0: not measured."""
    continuation_tokens: int = Field(32, ge=4)
    """Tokens by which each of them is continued."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, by name (extra `eval`)."""
    task_folder: str | None = None
    """Folder of task YAMLs of your own; None: only those that come with lm-evaluation-harness."""
    task_limit: int | None = Field(None, ge=1)
    """Examples per task, the first ones; None: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Worked examples before each question; None: as the task has it."""
    speed_runs: int = Field(5, ge=0)
    """Timed forward passes over one prompt of 2048 tokens (or the model's positions), after one to warm up; 0: none."""
    generation_runs: int = Field(0, ge=0)
    """Timed generations with the saved folders, after one to warm up; 0: not measured. 10 in the field's protocol."""
    generation_batch: int = Field(64, ge=1)
    """Sequences generated at once."""
    generation_prompt_tokens: int = Field(64, ge=1)
    """Tokens of each of their prompts."""
    generation_new_tokens: int = Field(128, ge=1)
    """Tokens that each gets."""


class PruneSection(_Section):
    method: str = "tsp"
    """Name of a method or baseline, see `tsp prune --help`."""
    ratio: float = Field(0.25, gt=0, lt=1)
    """Share of the layers to drop: floor(ratio * L + 0.5) of them."""
    num_drop: int | None = Field(None, ge=1)
    """Layers to drop; None: from the ratio."""
    drop: tuple[int, ...] | None = None
    """Exactly these 0-based layers; None: the method chooses."""
    protect_first: int = Field(0, ge=0)
    """Layers at the start that are never dropped."""
    protect_last: int = Field(0, ge=0)
    """Layers at the end that are never dropped."""
    score_blocks: int = Field(64, ge=1)
    """Calibration sequences on which the baselines measure layers; the method's own gates see them all."""
    verify_blocks: int = Field(32, ge=1)
    """Calibration sequences on which a selection's loss is measured, for the record and for the swap search."""
    swap_rounds: int = Field(0, ge=0)
    """Rounds of swap search after the selection: exchange a doomed for a kept layer while the loss falls."""


class TrainConfig(_Section):
    batch_size: int = Field(8, ge=1)
    """Sequences per optimizer step, over all ranks."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per optimizer step and rank; batch_size = ranks * accumulation * micro-batch."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""


class Stage1Config(_Section):
    placement: Literal["residual", "output"] = "residual"
    """`residual`: the layer emits x_in + g * f(x_in); `output`: g * x_out (paper)."""
    schedule: Literal["budget", "greedy", "one-shot"] = "budget"
    """`budget`: projection on a shrinking budget; `greedy`: one layer a round (paper); `one-shot`: all at once."""
    l1: Literal["subgradient", "proximal"] = "subgradient"
    """How the l1 penalty acts (greedy and one-shot)."""
    lambda1: float = Field(5e-3, ge=0)
    """Weight of the l1 penalty (greedy and one-shot)."""
    lr: float = Field(0.05, gt=0)
    """Step size of the gates. `budget`: the mean step over all gates at the peak; else Adam's."""
    steps: int = Field(100, ge=1)
    """Optimizer steps: in all (`budget`, `one-shot`) or per doomed layer (`greedy`)."""
    shrink_share: float = Field(0.5, gt=0, le=1)
    """Share of the steps over which the budget shrinks from L to L - num_drop."""
    sharpen: float = Field(4.0, ge=0)
    """Final weight of g * (1 - g) beside the loss's gradient, whose mean size is 1 (`budget`)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of the gates' gradient (`budget`)."""


class LossWeights(_Section):
    lm: float = Field(0.0, ge=0)
    """Cross-entropy on the calibration text."""
    distill: float = Field(1.0, ge=0)
    """KL(dense || pruned) on the same tokens, times temperature squared, mean over tokens."""


class LoraConfig(_Section):
    rank: int = Field(32, ge=1)
    """Of the adapters on every linear map of the layers."""
    alpha: float = Field(64.0, gt=0)
    """Adapters are scaled by alpha / rank."""


class Stage2Config(_Section):
    trainable: Literal["lora", "full", "none"] = "lora"
    """What moves: adapters, all weights, or (for study) only the doomed layers' gates."""
    task: LossWeights = LossWeights()
    """Weights of the parts of the task loss."""
    temperature: float = Field(1.0, gt=0)
    """Of the distillation."""
    lambda2: float = Field(0.0, ge=0)
    """Weight of the gap penalty."""
    gap_norm: Literal["l1", "l2"] = "l2"
    """Norm of the gap of one token."""
    gap_reduction: Literal["token-mean", "token-sum", "frobenius"] = "token-mean"
    """From `[B, T]` token norms to a number; `frobenius`: the norm of the whole tensor."""
    gates: Literal["hold", "anneal", "off"] = "off"
    """Gates of the doomed layers: stay at 1 (paper), go linearly to 0, are 0 from the first step."""
    anneal_share: float = Field(0.3, gt=0, le=1)
    """Share of the steps over which `anneal` closes the gates."""
    lr: float = Field(1e-3, ge=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; after that it falls by a half cosine to a tenth."""
    clip: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient; None: no clipping."""
    steps: int = Field(100, ge=0)
    """Optimizer steps."""
    lora: LoraConfig = LoraConfig()
    """Adapters of `trainable: lora`."""


class TrackingConfig(_Section):
    experiment: str | None = None
    """MLflow experiment; None: MLFLOW_EXPERIMENT_NAME, else `tsp`."""
    run_name: str | None = None
    """Name of the run; None: method, model and ratio."""
    register_as: str | None = None
    """Name in the model registry; None: `<model>-pruned`."""
    register_model: bool = True
    """Register the pruned model."""
    log_every: int = Field(1, ge=1)
    """Steps between two points of a metric."""


class JobConfig(_Section):
    """One pruning job."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    prune: PruneSection = PruneSection()
    transfer: Literal["stage2", "finetune", "distill", "none"] = "stage2"
    """How what the doomed layers know is moved: `finetune`, `distill`: drop first, then train as long as stage 2."""
    train: TrainConfig = TrainConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    tracking: TrackingConfig = TrackingConfig()
    seed: int = Field(0, ge=0)
    """Of the order of the sequences, the adapters' start values and random choices."""


def load_config(layers: Iterable[Mapping[str, Any]]) -> JobConfig:
    """Merge the layers, later ones win, and check the result.

    Raises:
        ConfigError: unknown keys or values out of range; all of them in one message.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, layer)
    try:
        return JobConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("; ".join(_fault(fault) for fault in error.errors())) from None


def parse_override(text: str) -> dict[str, Any]:
    """`stage1.steps=20` -> `{"stage1": {"steps": 20}}`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set must be KEY=VALUE, got {text!r}")
    return nest(key, parse_yaml(value, f"--set {key}"))


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """`nest("a.b", 1)` -> `{"a": {"b": 1}}`."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nest`, for all leaves: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def number_to_drop(config: PruneSection, num_layers: int) -> int:
    """How many layers go, in [1, L - 1].

    Raises:
        ConfigError: the ratio gives none, or nothing would be left.
    """
    if config.drop is not None:
        return len(config.drop)
    if config.num_drop is not None:
        if config.num_drop >= num_layers:
            raise ConfigError(f"prune.num_drop must be in [1, {num_layers - 1}], got {config.num_drop}")
        return config.num_drop
    num_drop = math.floor(config.ratio * num_layers + 0.5)
    if not 1 <= num_drop < num_layers:
        raise ConfigError(
            f"prune.ratio drops {num_drop} of {num_layers} layers, got {config.ratio}; "
            f"allowed is [0.5/{num_layers}, {num_layers - 0.5}/{num_layers})"
        )
    return num_drop


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _fault(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(fault['loc'])}"
    allowed = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{key}: {allowed}, got {fault['input']!r}"


def _nearest(loc: tuple[str | int, ...]) -> str:
    section: type[BaseModel] = JobConfig
    for part in loc[:-1]:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    near = difflib.get_close_matches(str(loc[-1]), list(section.model_fields), n=1)
    return f", did you mean {near[0]}?" if near else f"; known are {', '.join(section.model_fields)}"

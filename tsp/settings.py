"""The sections of a job's config: every number of a job has its one master here, with its default and its range."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Section):
    path: str | None = None
    """Hub id, folder, or `models:/name@alias`; None: the embedded demo model."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None: the default branch."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the weights in memory. `auto`: bf16 on a GPU, fp32 on a CPU. Gates are always fp32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


TUNING_BLOCKS = 32
"""Of `data.tuning_blocks` where something is decided on them and nobody said how many."""


class DataConfig(Section):
    source: str = "stdlib"
    """Calibration text: hub id (`name` or `name:configuration`), file or folder of .txt/.jsonl/.parquet, `stdlib`."""
    block_tokens: int | None = Field(None, ge=2)
    """Tokens per calibration sequence; None: min(2048, the model's positions)."""
    max_blocks: int | None = Field(128, ge=1)
    """Sequences to take from the corpus, evenly spread; None: all. 128 in the paper."""
    replies_only: bool = False
    """Of rows of `messages`, learn only what the assistant says; the rest is read. Rows of `text` count whole."""
    tuning_blocks: int = Field(0, ge=0)
    """Sequences, at most, of documents neither trained nor reported on, whose loss compares settings, and numbers of
    layers under `prune.max_ppl_ratio`, which sets 32 aside unless another number is given."""


class EvalConfig(Section):
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


class PruneSection(Section):
    method: str = "tsp"
    """Name of a method or baseline, see `tsp prune --help`."""
    ratio: float = Field(0.25, gt=0, lt=1)
    """Share of the layers to drop: floor(ratio * L + 0.5) of them."""
    num_drop: int | None = Field(None, ge=1)
    """Layers to drop; None: from the ratio."""
    drop: tuple[int, ...] | None = None
    """Exactly these 0-based layers; None: the method chooses."""
    max_ppl_ratio: float | None = Field(None, gt=1)
    """Drop the most layers whose perplexity after the transfer, on the tuning text, is at most so many times the dense
    model's; the search begins with `ratio`. None: the number is given."""
    min_speedup: float | None = Field(None, gt=1)
    """Drop the fewest layers without which a prompt is processed at least so many times as fast; None: as above."""
    protect_first: int = Field(0, ge=0)
    """Layers at the start that are never dropped."""
    protect_last: int = Field(0, ge=0)
    """Layers at the end that are never dropped."""
    score_blocks: int = Field(64, ge=1)
    """Calibration sequences on which layers are measured; gates that are learned see them all."""
    reuse_prefix: bool = True
    """`tsp`, `sleb`, `ppl`: do not compute the layers before a candidate again; holds L hidden states per batch."""
    verify_blocks: int = Field(32, ge=1)
    """Calibration sequences on which a selection's loss is measured, for the record and for the swap search."""
    swap_rounds: int = Field(0, ge=0)
    """Rounds of swap search after the selection, L losses each: exchange a doomed for a kept layer while that helps."""


class TrainConfig(Section):
    batch_size: int = Field(8, ge=1)
    """Sequences per optimizer step, over all ranks."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per optimizer step and rank; batch_size = ranks * accumulation * micro-batch."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""


class Stage1Config(Section):
    placement: Literal["residual", "output"] = "residual"
    """`residual`: the layer emits x_in + g * f(x_in); `output`: g * x_out (paper)."""
    schedule: Literal["search", "budget", "greedy", "one-shot"] = "search"
    """`search`: hard gates, one closes a round, by the loss on `prune.score_blocks`; `budget`: learned gates, projected
    on a shrinking budget; `greedy`: learned, one layer a round (paper); `one-shot`: all at once."""
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


class LossWeights(Section):
    lm: float = Field(0.1, ge=0)
    """Cross-entropy on the calibration text: a little learns a text that is new to the model, much learns another by
    heart."""
    distill: float = Field(1.0, ge=0)
    """KL(dense || pruned) on the same tokens, times temperature squared, mean over tokens."""


class LoraConfig(Section):
    rank: int = Field(32, ge=1)
    """Of the adapters on every linear map of the layers."""
    alpha: float = Field(64.0, gt=0)
    """Adapters are scaled by alpha / rank."""


class Stage2Config(Section):
    trainable: Literal["lora", "full", "none"] = "lora"
    """What moves: adapters, all weights, or (for study) only the doomed layers' gates."""
    task: LossWeights = LossWeights()
    """Weights of the parts of the task loss."""
    temperature: float = Field(1.0, gt=0)
    """Of the distillation."""
    hidden: float = Field(3.0, ge=0)
    """Weight of the squared distance of what each kept layer, and the final norm, is given to what the dense model
    gives it, over the square of the latter: mean over tokens and places. Without it and `task.distill` the dense model
    is not needed beside the one that learns."""
    lambda2: float = Field(0.0, ge=0)
    """Weight of the gap penalty."""
    lambda2_unit: Literal["loss", "one"] = "loss"
    """`loss`: with lambda2 = 1 the penalty is as large as the cross-entropy at the first step, whatever the scale of
    the model's hidden states; `one`: lambda2 as it stands (paper)."""
    gap_norm: Literal["l1", "l2"] = "l2"
    """Norm of the gap of one token."""
    gap_reduction: Literal["token-mean", "token-sum", "frobenius"] = "token-mean"
    """From the token norms of a step to a number; `frobenius`: the norm of all elements, which for `l2` is made from
    those of the micro-batches, taken to be alike."""
    gates: Literal["hold", "anneal", "off"] = "off"
    """Gates of the doomed layers: stay at 1 (paper), go linearly to 0, are 0 from the first step."""
    anneal_share: float = Field(0.3, gt=0, le=1)
    """Share of the steps over which `anneal` closes the gates."""
    lr: float | None = Field(None, ge=0)
    """Peak learning rate of AdamW; None: `lr_scale` times the loss to be won back over the l1 norm of its gradient, at
    the first step."""
    lr_scale: float = Field(2.0, gt=0)
    """See `lr`."""
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

    @property
    def has_teacher(self) -> bool:
        """Whether something is learned from the dense model, which then runs, too."""
        return self.task.distill > 0 or self.hidden > 0


class LacoConfig(Section):
    blocks: int = Field(8, ge=1)
    """Calibration sequences on which merged models are compared with the dense one; the paper takes a handful."""
    max_layers: int = Field(4, ge=2)
    """Layers that one merge makes one of, at most; C in the paper, whose value for 32 layers this is."""
    interval: int = Field(2, ge=1)
    """Layers to go down after a merge; I in the paper."""
    threshold: float = Field(0.65, ge=-1, le=1)
    """Least mean cosine of the last hidden state to the dense model's; T in the paper."""
    step: float = Field(0.05, gt=0)
    """By how much the threshold falls when too few layers could be merged."""


class ReplaceMeConfig(Section):
    ridge: float = Field(1.0, ge=0)
    """Pull of the folded map towards the identity, as a share of the mean square of what it is applied to."""


class StateConfig(Section):
    every_minutes: float = Field(10.0, ge=0)
    """Minutes of training between two training states, from which `--resume` goes on; 0: one after each step."""
    every_steps: int | None = Field(None, ge=1)
    """Also one after so many optimizer steps of a stage; None: by the minutes alone."""


class TrackingConfig(Section):
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


class Gpu(Section):
    """A device, as the data sheet has it or a probe has found it."""

    memory_gib: float = Field(gt=0)
    tflops: float = Field(gt=0)
    """Peak of dense bf16."""
    node_gb_s: float = Field(gt=0)
    """To the other GPUs of its node, one direction."""
    network_gb_s: float = Field(gt=0)
    """To other nodes, for each GPU."""
    utilisation: float = Field(0.45, gt=0, le=1)
    """Of the peak, in training steps; measured by `tsp plan --calibrate`."""
    reserved_gib: float = Field(1.5, ge=0)
    """Taken before anything is loaded: driver, kernels, NCCL."""
    slack: float = Field(1.0, ge=1)
    """What a step holds over what of it is live; more than 1 where memory that an allocator keeps for itself counts."""

"""What passes between the steps of a job: small frozen records, each saved as a JSON artifact."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tsp.files import sync
from tsp.masking import masked_tree


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a selection knows about the layers."""

    method: str
    values: tuple[float, ...]
    """One per layer, lower = drop first."""
    order: tuple[int, ...]
    """Layer indices, the first to drop first; may end after the layers that were asked for."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The doomed layers."""

    doomed: tuple[int, ...]
    """Sorted indices."""
    loss_dense: float
    """Mean cross-entropy on the calibration blocks, nats per token."""
    loss_bypassed: float
    """The same with the doomed layers bypassed."""
    swapped: bool
    """Whether the swap search changed the order's own choice."""


@dataclass(frozen=True, kw_only=True)
class DropReport:
    """What was removed and how the result was proved."""

    dropped: tuple[int, ...]
    num_layers: int
    checkpoint: str
    max_logit_difference: float
    """Largest |reloaded - in memory| over a probe batch."""
    cached_equals_uncached: bool
    """Greedy generation with and without the key-value cache gives the same tokens."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity on one corpus by the field's protocol."""

    ppl: float
    num_windows: int
    block_tokens: int
    window_losses: tuple[float, ...] = field(repr=False, default=())
    """Mean cross-entropy of each window, nats per token."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How near a state's predictions are to the dense model's, over the positions that are compared."""

    kl: float
    """Mean KL(dense || state), nats per token."""
    top1: float
    """Share of the positions at which both hold the same token for the likeliest."""
    num_positions: int


@dataclass(frozen=True, kw_only=True)
class SlicePerplexity:
    """Perplexity over the tokens of one slice, predicted inside the corpus's windows."""

    ppl: float
    num_tokens: int
    fidelity: Fidelity | None
    """None: not compared, or at no position of the slice."""
    window_losses: tuple[float, ...] = field(repr=False)
    """Mean cross-entropy of the slice's tokens in each window that has any, nats per token."""
    window_tokens: tuple[int, ...] = field(repr=False)
    """How many that are."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One state of the model: dense, bare drop or pruned."""

    perplexity: dict[str, Perplexity]
    """By corpus, in the order of the command line."""
    prompt_tokens_per_s: float | None
    """Throughput of one sequence without cache; None: not measured."""
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    """By corpus; empty for the dense model, and where nothing was compared."""
    slices: dict[str, dict[str, SlicePerplexity]] = field(default_factory=dict)
    """By corpus and slice."""
    continuations: tuple[tuple[int, ...], ...] = ()
    """The tokens with which each prompt went on; empty: not measured."""
    prompt_slices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By slice of the first corpus: which of the prompts end in it."""
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics by task, as lm-evaluation-harness names them: `acc`, `acc_stderr`, `acc_norm`, ..."""


def write_json(record: Any, path: Path) -> None:
    """Write a record or a dict as JSON, credentials masked; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = record if isinstance(record, dict | list) else asdict(record)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(masked_tree(content), indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)

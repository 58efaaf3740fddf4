"""What a pass holds beside the weights and computes, found by running it on tensors that have shapes and no data.

    shape = shape_of(ModelConfig(path="meta-llama/Llama-3.1-70B"))     # reads config.json alone
    shape.cost(Pass(batch=1, block_tokens=2048, learns="gates"), torch.bfloat16)

A family's activations are what its own code keeps for the backward pass, and its operations are those that torch's
`FlopCounterMode` sees, so no formula per family is needed. Gates and losses are the stages' own, adapters an imitation
of peft's, which cannot be put into a fake model; gaps and the optimizer's step are left out. How much of the weights a
rank holds is the affair of `capacity.py`.

Shapes: B sequences, T tokens.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tsp.config import ModelConfig
from tsp.decoder import Decoder, find_decoder
from tsp.errors import ModelError
from tsp.evaluation.perplexity import mean_losses
from tsp.gates import Gates
from tsp.linear import linear_maps, num_outputs
from tsp.live import LiveBytes, cheap_collections, operations
from tsp.losses import hidden_loss, lm_loss, task_loss
from tsp.masking import one_line
from tsp.selection import spread
from tsp.settings import Stage2Config
from tsp.skeleton import build_skeleton, one_text_a_row
from tsp.source import open_config
from tsp.surgery import mended_config

_SHORT, _LONG = 4, 8
"""Layers of the stacks from which a longer one is extrapolated: all that a pass costs is linear in them."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One micro-batch on one rank."""

    batch: int
    """Sequences."""
    block_tokens: int
    learns: Literal["nothing", "gates", "transfer"] = "nothing"
    """`nothing`: an evaluation; `gates`: stage 1; `transfer`: stage 2, with the dense model's pass if it distils."""
    stage2: Stage2Config = field(default_factory=Stage2Config)
    num_doomed: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class Cost:
    """What a pass takes."""

    peak_bytes: float
    """The most that it holds at once of what it makes itself, gradients of the weights among it."""
    flops: float
    """Of matrix products and attention (`operations`); a product of N x K by K x M has 2 N K M."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.peak_bytes + other.peak_bytes, self.flops + other.flops)

    def times(self, factor: float) -> "Cost":
        return Cost(factor * self.peak_bytes, factor * self.flops)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """A model without its weights."""

    name: str
    config: Any
    """transformers config."""
    trust: bool
    stack: str
    num_outputs: int | None
    """See `Decoder`."""
    num_parameters: int
    """A tied weight counted once."""
    layer_parameters: tuple[int, ...]
    largest_module: int
    """Parameters of the largest module with parameters of its own, the head or the embeddings: gathered at once."""
    adapter_width: int
    """Features in and out of all linear maps of a layer: an adapter of rank r has r times as many parameters."""
    hidden_size: int
    vocab_size: int
    max_positions: int

    @property
    def num_layers(self) -> int:
        return len(self.layer_parameters)

    def with_layers(self, kept: Sequence[int]) -> "Shape":
        """The same model with these layers alone."""
        return _shape(self.name, mended_config(self.config, kept), trust=self.trust)

    @functools.cache  # noqa: B019  As many shapes as models in a plan.
    def cost(self, one: Pass, dtype: torch.dtype) -> Cost:
        """Of one micro-batch on one rank.

        Args:
            one: what is done.
            dtype: of the weights in memory.
        """
        if self.num_layers <= _LONG:
            return self._run(one, dtype)
        short, long = self._spread(_SHORT), self._spread(_LONG)
        few = replace(one, num_doomed=min(one.num_doomed, 1))
        least = short._run(few, dtype)
        of_layers = (long._run(few, dtype) + least.times(-1)).times((self.num_layers - _SHORT) / (_LONG - _SHORT))
        if one.num_doomed <= 1:
            return least + of_layers
        more = short._run(replace(one, num_doomed=2), dtype)
        return least + of_layers + (more + least.times(-1)).times(one.num_doomed - 1)

    @functools.cache  # noqa: B019
    def _spread(self, num_layers: int) -> "Shape":
        return self.with_layers(spread(list(range(self.num_layers)), num_layers))

    def _run(self, one: Pass, dtype: torch.dtype) -> Cost:
        # torch 2.13 leaves reference cycles behind where a checkpoint is computed again on fake tensors, not on real
        # ones: what hangs on them would be counted as held.
        live, flops = LiveBytes(collect=one.checkpointing), operations()
        with FakeTensorMode(), cheap_collections(), one_text_a_row():
            model = build_skeleton(self.config, trust=self.trust, dtype=dtype).eval().requires_grad_(False)
            decoder, tokens_BT = find_decoder(model), torch.zeros(one.batch, one.block_tokens, dtype=torch.long)
            if one.checkpointing:
                model.train()
                # The state of the random numbers is real and cannot be kept on fake tensors.
                model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            act = {"nothing": _measured, "gates": _stage1, "transfer": _stage2}[one.learns]
            act(decoder, tokens_BT, one, live, flops)
        return Cost(peak_bytes=live.peak, flops=flops.get_total_flops())


def shape_of(config: ModelConfig) -> Shape:
    """From `config.json` alone.

    Raises:
        ModelError: there is none, or it is that of no decoder-only model.
    """
    name, model_config = open_config(config)
    try:
        return _shape(name, model_config, trust=config.trust_remote_code)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        raise ModelError(f"model {name} is no causal language model: {one_line(error)}") from None


def _shape(name: str, config: Any, *, trust: bool) -> Shape:
    with FakeTensorMode():
        model = build_skeleton(config, trust=trust)
        decoder = find_decoder(model)
        text = model.config.get_text_config(decoder=True)
        middle = decoder.layers[decoder.num_layers // 2]
        return Shape(
            name=name,
            config=config,
            trust=trust,
            stack=decoder.path,
            num_outputs=decoder.num_outputs,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            layer_parameters=tuple(sum(p.numel() for p in layer.parameters()) for layer in decoder.layers),
            largest_module=max(
                sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()
            ),
            adapter_width=sum(sum(_features(linear)) for _, linear in linear_maps(middle)),
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            max_positions=getattr(text, "max_position_embeddings", None) or 2048,
        )


def _measured(decoder: Decoder, tokens_BT: Tensor, one: Pass, live: LiveBytes, flops: FlopCounterMode) -> None:
    with flops, live, torch.no_grad():
        mean_losses(_logits(decoder, tokens_BT), tokens_BT)


def _stage1(decoder: Decoder, tokens_BT: Tensor, one: Pass, live: LiveBytes, flops: FlopCounterMode) -> None:
    gates = Gates(decoder)
    gates.values.requires_grad_(True)
    with flops, live, gates.attached():
        lm_loss(_logits(decoder, tokens_BT), tokens_BT).backward()


def _stage2(decoder: Decoder, tokens_BT: Tensor, one: Pass, live: LiveBytes, flops: FlopCounterMode) -> None:
    config, doomed = one.stage2, range(decoder.num_layers - one.num_doomed, decoder.num_layers)
    closed = doomed if config.gates == "off" else range(0)
    learning = [layer for index, layer in enumerate(decoder.layers) if index not in closed]
    if config.trainable == "lora":
        for layer in learning:
            _adapt(layer, config.lora.rank)
    elif config.trainable == "full":
        decoder.model.requires_grad_(True)
    gates = Gates(decoder, gated=doomed, recorded=doomed)
    gates.values.requires_grad_(config.trainable == "none")
    with flops, live:
        teacher_BTV, dense = None, []
        if config.has_teacher:
            with torch.no_grad(), decoder.hidden_states(config.hidden > 0) as dense:
                teacher_BTV = _logits(decoder, tokens_BT)
        with nullcontext() if closed else gates.attached(), decoder.bypassing(closed):
            with decoder.hidden_states(config.hidden > 0) as states:
                logits_BTV = _logits(decoder, tokens_BT)
            loss = task_loss(logits_BTV, tokens_BT, **dict(config.task), teacher_BTV=teacher_BTV).total
            if config.hidden:
                loss = loss + config.hidden * hidden_loss(states, dense, doomed)
            states.clear()
            loss.backward()


def _logits(decoder: Decoder, tokens_BT: Tensor) -> Tensor:
    logits: Tensor = decoder.model(input_ids=tokens_BT, use_cache=False).logits
    return logits


def _adapt(layer: nn.Module, rank: int) -> None:
    """A low-rank path beside each linear map, as peft computes it; peft itself cannot be put into a fake model."""
    for _, linear in linear_maps(layer):
        weight: Any = linear.weight
        outputs, inputs = _features(linear)
        down, up = nn.Parameter(weight.new_empty(rank, inputs)), nn.Parameter(weight.new_empty(outputs, rank))
        linear.register_forward_hook(
            lambda _, args, out, down=down, up=up: out + 2.0 * F.linear(F.linear(args[0], down), up)
        )


def _features(linear: Any) -> tuple[int, int]:
    """Out and in."""
    outputs: int = num_outputs(linear)
    return outputs, linear.weight.numel() // outputs

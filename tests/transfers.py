"""A small model after stage 2, and what the tests of it ask of every such model."""

import torch

from tests.models import bench, distillation_loss, job, logits, tiny_model, tokens
from tsp.methods.trsp.stage2 import transfer

LAYERS = 4
DOOMED = (1, 2)


def transferred(model=None, blocks=None, doomed=DOOMED, save_dtype=torch.float32, **settings):
    made = bench(
        tiny_model(num_layers=LAYERS) if model is None else model,
        tokens(32, 12) if blocks is None else blocks,
        job(**settings),
    )
    transfer(made, doomed, save_dtype=save_dtype)
    return made


def changed(made) -> set[str]:
    """Names of the weights that differ from the dense model's, which `load_again` gives."""
    dense = made.load_again().model.state_dict()
    after = made.decoder.model.state_dict()
    assert list(after) == list(dense)
    return {name for name, tensor in after.items() if not torch.equal(tensor, dense[name])}


def distillation(made, doomed=DOOMED) -> float:
    """KL(dense || pruned) on all blocks."""
    with made.decoder.bypassing(doomed):
        pruned = logits(made.decoder.model, made.blocks_NT)
    return distillation_loss(pruned, logits(made.load_again().model, made.blocks_NT)).item()


def plain(made) -> bool:
    """Frozen, nothing bypassed, no hooks of ours, no adapters."""
    model = made.decoder.model
    return (
        not hooks(model)
        and made.decoder.bypassed == frozenset()
        and not any(parameter.requires_grad for parameter in model.parameters())
        and not any("lora" in name for name, _ in model.named_modules())
    )


def hooks(model) -> list[str]:
    """Names of the hooks on all modules."""
    return [
        hook.__qualname__
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]

"""The paper's preset in plain PyTorch: no DeepSpeed, no peft, nothing of tsp. `test_trsp.py` holds tsp against it.

Source: arXiv 2505.18232, sections 3.1 and 3.2, as far as they say; else `methods/trsp/paper.yaml` and method.md.
"""

import math

import torch
import torch.nn.functional as F
from torch.func import functional_call


def batch(blocks, size, step, seed):
    """A new order every epoch; the epochs joined."""
    orders = lambda epoch: torch.randperm(
        len(blocks), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    )
    samples = [divmod(sample, len(blocks)) for sample in range(step * size, (step + 1) * size)]
    return blocks[[int(orders(epoch)[position]) for epoch, position in samples]]


def lm(logits, ids):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def stage1(model, layers, blocks, *, num_drop, lambda1, lr, steps, size, seed):
    """LM + lambda1 * sum|g|, layer i emits g_i * x_out; after each round the smallest |g| is doomed and bypassed."""
    gates, doomed, trace = torch.ones(len(layers), requires_grad=True), [], []
    adam = torch.optim.Adam([gates], lr=lr)
    emit = lambda i: lambda module, args, out: args[0] if i in doomed else gates[i] * out
    hooks = [layer.register_forward_hook(emit(i)) for i, layer in enumerate(layers)]
    for _ in range(num_drop):
        for step in range(steps):
            ids = batch(blocks, size, step, seed)
            alive = [i for i in range(len(layers)) if i not in doomed]
            loss = lm(model(input_ids=ids, use_cache=False).logits, ids)
            adam.zero_grad()
            (total := loss + lambda1 * gates[alive].abs().sum()).backward()
            adam.step()
            trace.append(([0.0 if i in doomed else g for i, g in enumerate(gates.tolist())], total.item(), loss.item()))
        doomed.append(min(alive, key=lambda i: (gates[i].abs().item(), -i)))
    [hook.remove() for hook in hooks]
    return doomed, trace


def stage2(model, layers, blocks, doomed, *, adapters, lambda2, lr, warmup, clip, steps, size, seed):
    """LM + lambda2 * sum of mean token norms of the doomed gaps. `adapters`: {weight: (A, B, scale)} or None."""
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = [p for a, b, _ in adapters.values() for p in (a, b)] if adapters else list(base.values())
    [p.requires_grad_(True) for p in trained]
    weights = lambda: base | {name: base[name] + scale * b @ a for name, (a, b, scale) in (adapters or {}).items()}
    adamw, gaps, trace = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0), {}, []
    keep = lambda i: lambda module, args, out: gaps.__setitem__(i, (out - args[0]).norm(dim=-1).mean())
    hooks = [layers[i].register_forward_hook(keep(i)) for i in doomed]
    for step in range(steps):
        rising = (step + 1) / (warmup * steps + 1)
        falling = 0.55 + 0.45 * math.cos(math.pi * (step - warmup * steps) / max(steps - warmup * steps, 1))
        adamw.param_groups[0]["lr"] = lr * (rising if step < warmup * steps else falling)
        ids = batch(blocks, size, step, seed)
        loss = lm(functional_call(model, weights(), (), {"input_ids": ids, "use_cache": False}).logits, ids)
        gap = lambda2 * sum(gaps.values())
        adamw.zero_grad()
        (loss + gap).backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        adamw.step()
        trace.append(((loss + gap).item(), loss.item(), gap.item(), {i: size.item() for i, size in gaps.items()}))
    [hook.remove() for hook in hooks]
    return {name: weight.detach() for name, weight in weights().items()}, trace

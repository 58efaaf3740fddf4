"""Stage 1: learn one gate per layer under a penalty or a budget, with frozen weights, and order the layers by it.

L1 = LM(W, X; gates) + lambda1 * sum_i |g_i| (paper, section 3.1). Three schedules: `greedy` (paper: learn, doom the
smallest, bypass it, learn again), `one-shot` (the paper's ablation), and `budget` (ours: projected gradient descent on
sum(g) = L - dropped so far, 0 <= g <= 1; no lambda1). A fourth, `search` (ours, the default of `tsp`), has hard gates
and nothing to learn: `hard.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tsp.config import Stage1Config
from tsp.gates import Gates
from tsp.interrupts import deferred
from tsp.losses import lm_loss
from tsp.methods.base import Bench
from tsp.methods.trsp import hard
from tsp.optimizer_state import set_adam
from tsp.penalties import project_capped_simplex, soft_threshold
from tsp.progress import phase
from tsp.records import Scores
from tsp.selection import ascending
from tsp.training import StepStats, train


def score(bench: Bench, num_drop: int) -> Scores:
    """Order the layers by their gates."""
    config = bench.config.stage1
    if config.schedule == "search":
        return hard.score(bench, num_drop)
    gates = Gates(bench.decoder, config.placement)
    gates.values.requires_grad_(True)
    with gates.attached():
        if config.schedule == "budget":
            return _budget(bench, gates, num_drop)
        return _penalised(bench, gates, num_drop, rounds=num_drop if config.schedule == "greedy" else 1)


def _budget(bench: Bench, gates: Gates, num_drop: int) -> Scores:
    """One projected gradient descent: the budget shrinks from L to L - num_drop, then the gates are driven to 0 or 1.

    On the budget alone the optimum is often a common damping of all layers, which chooses nothing. Descent on
    g * (1 - g), growing once the budget is reached, turns it into a choice.
    """
    config = bench.config.stage1
    free = torch.tensor([index for index in range(len(gates.values)) if index not in bench.protected])
    velocity = torch.zeros(len(gates.values), device=gates.values.device)
    question = {"num_drop": num_drop}
    known = bench.known("stage1", question)
    if known:
        _set(gates.values, known.tensors["gates"])
        _set(velocity, known.tensors["velocity"])

    def update(step: int) -> None:
        gradient = _averaged_gradient(bench, gates)
        velocity.mul_(config.momentum).add_(gradient)
        progress = (step + 1) / config.steps
        shrunk = min(1.0, progress / config.shrink_share)
        sharpened = max(0.0, progress - config.shrink_share) / max(1 - config.shrink_share, 1e-12) * config.sharpen
        with torch.no_grad():
            # One step size for all gates; its scale does not depend on the model's loss.
            direction = velocity[free] / velocity[free].abs().mean().clamp(min=1e-12)
            direction += sharpened * (1 - 2 * gates.values[free])
            budget = len(free) - shrunk * num_drop
            gates.values[free] = project_capped_simplex(gates.values[free] - config.lr * direction, budget)

    def keep(step: StepStats) -> None:
        bench.keep("stage1", question, step, {"gates": gates.values, "velocity": velocity}.items, {})

    _run(bench, gates, update, keep, penalty=False, name="stage 1", first_step=known.step if known else 0)
    values = gates.values.detach().tolist()
    return Scores(method=f"gates-{config.schedule}", values=tuple(values), order=tuple(ascending(values)))


def _penalised(bench: Bench, gates: Gates, num_drop: int, rounds: int) -> Scores:
    """Adam under the l1 penalty; after each round but a one-shot's, the smallest |g| is doomed and bypassed."""
    config = bench.config.stage1
    optimizer = torch.optim.Adam([gates.values], lr=config.lr)

    def update(step: int) -> None:
        gates.values.grad = _averaged_gradient(bench, gates)
        optimizer.step()
        if config.l1 == "proximal":
            with torch.no_grad():
                gates.values.copy_(soft_threshold(gates.values, _threshold(optimizer, gates.values, config)))
        optimizer.zero_grad()

    def keep(step: StepStats) -> None:
        tensors = {"gates": gates.values, "sizes": sizes, **optimizer.state[gates.values]}
        about = {"round": round_number, "doomed": doomed}
        bench.keep("stage1", question, step, tensors.items, about)

    doomed: list[int] = []
    sizes = gates.values.detach().abs()
    question = {"num_drop": num_drop}
    known = bench.known("stage1", question)
    first_round = first_step = 0
    if known:
        first_round, doomed, first_step = known.about["round"], known.about["doomed"], known.step
        tensors = dict(known.tensors)
        _set(gates.values, tensors.pop("gates"))
        _set(sizes, tensors.pop("sizes"))
        set_adam(optimizer, gates.values, tensors)
        bench.decoder.bypass(doomed)
    for round_number in range(first_round, rounds):
        name = f"stage 1, layer {round_number + 1} of {rounds}" if rounds > 1 else "stage 1"
        _run(bench, gates, update, keep, penalty=config.l1 == "subgradient", name=name, first_step=first_step)
        first_step = 0
        alive = [index for index in range(len(gates.values)) if index not in doomed]
        sizes[alive] = gates.values.detach().abs()[alive]
        if config.schedule == "greedy":
            doomed.append(next(i for i in ascending(sizes.tolist()) if i in alive and i not in bench.protected))
            bench.decoder.bypass(doomed)
    bench.decoder.bypass(())
    rest = [index for index in ascending(sizes.tolist()) if index not in doomed]
    return Scores(method=f"gates-{config.schedule}", values=tuple(sizes.tolist()), order=(*doomed, *rest))


def _run(
    bench: Bench,
    gates: Gates,
    update: Callable[[int], None],
    keep: Callable[[StepStats], None],
    *,
    penalty: bool,
    name: str,
    first_step: int,
) -> None:
    config, engine, steps = bench.config, bench.engine, bench.config.stage1.steps
    assert bench.model is not None
    model = bench.model

    def loss(tokens_BT: Tensor, share: float) -> dict[str, Tensor]:
        lm = lm_loss(model(tokens_BT), tokens_BT, share)
        alive = [index for index in range(len(gates.values)) if index not in bench.decoder.bypassed]
        l1 = config.stage1.lambda1 * gates.values[alive].abs().sum()
        # A proximal step has the penalty in its update, and a budget has none.
        return {"total": lm + l1 if penalty else lm, "lm": lm, "penalty": l1}

    with deferred() as pending:
        stats = train(
            engine,
            model,
            bench.blocks_NT,
            config.train,
            num_steps=steps,
            seed=config.seed,
            loss=loss,
            decoder=bench.decoder,
            pending=pending,
            first_step=first_step,
            after_step=update,
        )
        for step in phase(stats, name, steps, show=engine.is_first):
            bench.log("stage1", step, gates.readable())
            keep(step)


def _set(values: Tensor, known: Tensor) -> None:
    with torch.no_grad():
        values.copy_(known)


def _averaged_gradient(bench: Bench, gates: Gates) -> Tensor:
    """`[L]` fp32; the gradient is taken away from the gates."""
    assert gates.values.grad is not None, "no gradient reached the gates"
    gradient = bench.engine.mean(gates.values.grad)
    gates.values.grad = None
    return gradient


def _threshold(optimizer: torch.optim.Adam, values_L: Tensor, config: Stage1Config) -> Tensor:
    """lr * lambda1 over Adam's own preconditioner, so that the step solves the paper's constrained form (method.md)."""
    state, beta2 = optimizer.state[values_L], optimizer.defaults["betas"][1]
    second = state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())
    return config.lr * config.lambda1 / (second.sqrt() + optimizer.defaults["eps"])

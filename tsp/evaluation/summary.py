"""The evaluations of a model's states side by side: what `result.json`, `tsp evaluate` and MLflow say of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tsp.evaluation.confidence import perplexity_interval, ratio_interval
from tsp.evaluation.generation import agreement, repetition
from tsp.records import Evaluation, SlicePerplexity

States = Mapping[str, Evaluation]


def summarise(states: States) -> dict[str, Any]:
    """Compare states.

    Args:
        states: by name. `dense`, where it is among them, is what the others are compared with; `pruned` is
            judged, or else the last.

    Returns:
        `perplexity`, `ppl_interval`, `ppl_ratio_interval`, `fidelity`: `{corpus: {state: ...}}`; `slices`:
        `{corpus: {slice: {num_tokens, ppl, kl, top1, ratio_interval, num_prompts, repetition}}}`; `worst_slice`;
        `generation`: `{state: ...}`; `tasks`: `{task: {state: {metric: ...}}}`; `speed`. Empty where not measured.
        Intervals hold 95 %.
    """
    corpora = list(next(iter(states.values())).perplexity)
    slices = {corpus: found for corpus in corpora if (found := _slices(states, corpus))}
    tasks = list(next(iter(states.values())).tasks)
    return {
        "perplexity": {
            corpus: {state: evaluation.perplexity[corpus].ppl for state, evaluation in states.items()}
            for corpus in corpora
        },
        "ppl_interval": {
            corpus: {
                state: perplexity_interval(evaluation.perplexity[corpus].window_losses)
                for state, evaluation in states.items()
            }
            for corpus in corpora
        },
        "ppl_ratio_interval": {corpus: _ratio_intervals(states, corpus) for corpus in corpora},
        "fidelity": {
            corpus: {
                state: {"kl": one.kl, "top1": one.top1}
                for state, evaluation in states.items()
                if (one := evaluation.fidelity.get(corpus)) is not None
            }
            for corpus in corpora
        },
        "slices": slices,
        "worst_slice": _worst(slices, "pruned" if "pruned" in states else list(states)[-1]),
        "generation": _generation(states),
        "tasks": {task: {state: evaluation.tasks[task] for state, evaluation in states.items()} for task in tasks},
        "speed": {
            "prompt_tokens_per_s": {state: evaluation.prompt_tokens_per_s for state, evaluation in states.items()}
        },
    }


def metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The same for MLflow, by the metric names of the contract."""
    values: dict[str, float] = {}
    for corpus, ppl in summary["perplexity"].items():
        values |= {f"eval/{corpus}/ppl_{state}": value for state, value in ppl.items()}
        values[f"ppl_ratio/{corpus}"] = ppl["pruned"] / ppl["dense"]
        low, high = summary["ppl_ratio_interval"][corpus]["pruned"]
        values |= {f"eval/{corpus}/ppl_ratio_low": low, f"eval/{corpus}/ppl_ratio_high": high}
        for state, fidelity in summary["fidelity"][corpus].items():
            values |= {f"eval/{corpus}/{name}_{state}": value for name, value in fidelity.items()}
        for name, row in summary["slices"].get(corpus, {}).items():
            for kind in ("ppl", "kl", "top1", "repetition"):
                values |= {f"eval/{corpus}/slice/{name}/{kind}_{state}": value for state, value in row[kind].items()}
    values["ppl_ratio"] = max(value for key, value in values.items() if key.startswith("ppl_ratio/"))
    if summary["worst_slice"] is not None:
        values["worst_slice_ratio"] = summary["worst_slice"]["ratio"]
    for state, row in summary["generation"].items():
        values |= {f"eval/generation/{name}_{state}": value for name, value in row.items() if value is not None}
    for task, by_state in summary["tasks"].items():
        for state, row in by_state.items():
            values |= {f"eval/{task}/{name}_{state}": value for name, value in row.items()}
    for kind, speeds in summary["speed"].items():
        values |= {f"eval/{kind}_{state}": value for state, value in speeds.items() if value is not None}
    return values


def _ratio_intervals(states: States, corpus: str) -> dict[str, tuple[float, float]]:
    """Of the ratios to the dense model's perplexity."""
    losses = {state: evaluation.perplexity[corpus].window_losses for state, evaluation in states.items()}
    if "dense" not in losses:
        return {}
    return {state: ratio_interval(losses[state], losses["dense"]) for state in losses if state != "dense"}


def _slices(states: States, corpus: str) -> dict[str, Any]:
    first = next(iter(states.values()))
    # Only text of the first corpus is continued.
    prompts = first.prompt_slices if corpus == next(iter(first.perplexity)) else {}
    return {
        name: _slice({state: states[state].slices[corpus][name] for state in states})
        | _repetition(states, prompts.get(name, ()))
        for name in first.slices.get(corpus, {})
    }


def _repetition(states: States, prompts: Sequence[int]) -> dict[str, Any]:
    """How much the continuations of some of the prompts repeat themselves."""
    found = {
        state: repetition([evaluation.continuations[number] for number in prompts])
        for state, evaluation in states.items()
        if prompts and evaluation.continuations
    }
    return {"num_prompts": len(prompts), "repetition": found}


def _slice(by_state: Mapping[str, SlicePerplexity]) -> dict[str, Any]:
    compared = {state: one.fidelity for state, one in by_state.items() if one.fidelity is not None}
    dense = by_state.get("dense")
    return {
        "num_tokens": next(iter(by_state.values())).num_tokens,
        "ppl": {state: one.ppl for state, one in by_state.items()},
        "kl": {state: fidelity.kl for state, fidelity in compared.items()},
        "top1": {state: fidelity.top1 for state, fidelity in compared.items()},
        "ratio_interval": {
            state: ratio_interval(one.window_losses, dense.window_losses, weights=one.window_tokens)
            for state, one in by_state.items()
            # One window alone would give an interval of no width, which looks like certainty.
            if dense is not None and state != "dense" and len(one.window_losses) > 1
        },
    }


def _worst(slices: Mapping[str, Mapping[str, Any]], judged: str) -> dict[str, Any] | None:
    """The slice whose perplexity grew most, over all corpora."""
    ratios = [
        {"corpus": corpus, "slice": name, "ratio": row["ppl"][judged] / row["ppl"]["dense"]}
        for corpus, rows in slices.items()
        for name, row in rows.items()
        if "dense" in row["ppl"] and judged != "dense"
    ]
    # What is no number is worse than any.
    return max(ratios, key=lambda row: math.inf if math.isnan(row["ratio"]) else row["ratio"], default=None)


def _generation(states: States) -> dict[str, dict[str, float | None]]:
    dense = states["dense"].continuations if "dense" in states else None
    return {
        state: {
            "repetition": repetition(evaluation.continuations),
            "agreement": agreement(evaluation.continuations, dense) if dense else None,
        }
        for state, evaluation in states.items()
        if evaluation.continuations
    }

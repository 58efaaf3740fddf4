"""What has been measured of a pruned model, by the names that requirements use.

    measured = measured_of(result) | relative_to(champion_result, result)

`result` is a job's `result.json` or the document of `tsp evaluate --against`; what one lacks was not measured. Names:

- `ppl/<corpus>`, `loss/<corpus>` (its logarithm), `loss` (the largest), `ppl_ratio/<corpus>` (pruned / dense),
  `ppl_ratio` (the largest), `kl/<corpus>`, `kl` (the largest), `top1/<corpus>`, `top1` (the least)
- `slice_ratio/<slice>`, `slice_loss/<slice>`, `slice_kl/<slice>`, `slice_top1/<slice>`, `slice_repetition/<slice>`: of
  several corpora the worst; `worst_slice_ratio`
- `zero_shot/<task>` (accuracy), `zero_shot/<task>_drop` (dense minus pruned), `zero_shot_drop` (the largest of the
  tasks asked for)
- `speedup` (a prompt), `generation_speedup`, `parameters_ratio`, `size_ratio`, `size_gib`, `kv_cache_ratio`
- `repetition`, `agreement` of greedy continuations; `round_trip` (`ok` where a fresh process proved the saved folder)
- `vs_champion.<name>`: of accuracies' drops the difference, of all else candidate / champion
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tsp.evaluation.accuracy import accuracy, counted_tasks
from tsp.policy import VS_CHAMPION, Value

Measured = dict[str, Value]

_ON_TEXT = ("ppl", "loss", "kl", "top1", "slice_", "worst_slice_ratio", "repetition", "agreement")
"""Beginnings of names whose values are of the evaluation text."""
_DROP = "_drop"


def measured_of(result: Mapping[str, Any]) -> Measured:
    """All values that requirements may name, as far as they were measured."""
    state = _judged_state(result)
    values: Measured = {}
    for part in (_on_text, _on_slices, _on_tasks, _of_size, _of_speed, _of_generation):
        values |= dict(part(result, state))
    if result.get("checkpoint"):
        # A job ends with an error where the proof fails.
        values["round_trip"] = "ok"
    return values


def relative_to(champion: Mapping[str, Any], result: Mapping[str, Any]) -> Measured:
    """Values relative to the champion's, as far as both were measured, on the same text, its parts and the tasks."""
    ours, theirs = measured_of(result), measured_of(champion)
    apart = _not_alike(result, champion)
    found: Measured = {}
    for name, value in ours.items():
        other = theirs.get(name)
        if not name.startswith(apart) and isinstance(value, float | int) and isinstance(other, float | int):
            found[f"{VS_CHAMPION}{name}"] = _compared(name, value, other)
    if f"{VS_CHAMPION}ppl_ratio" in found:
        # The largest of the quotients, not the quotient of the largest.
        found[f"{VS_CHAMPION}ppl_ratio"] = _worst(
            float(value) for name, value in found.items() if name.startswith(f"{VS_CHAMPION}ppl/")
        )
    return found


def how_to_measure(name: str, known: Mapping[str, Value], call: str) -> str:
    """What somebody does who wants a value that is not there.

    Args:
        name: of the value.
        known: what was measured.
        call: the command of the promotion, to which options are added.
    """
    plain = name.removeprefix(VS_CHAMPION)
    if plain.startswith("zero_shot"):
        task = plain.partition("/")[2].removesuffix(_DROP) or "TASK"
        return f"`{call} --evaluate --tasks {task}`"
    if "slice" in plain:
        return f"`{call} --evaluate --slices FILE.yaml`"
    if plain == "generation_speedup":
        return f"`{call} --evaluate --set eval.generation_runs=10`"
    if plain == "round_trip":
        return "`tsp verify` of its folder, and register it again from a job that saved it"
    if name.startswith(VS_CHAMPION) and plain in known:
        return f"the champion was measured on other text, or not at all: `{call} --evaluate --eval-data ...`"
    if plain == "speedup" or plain.startswith(_ON_TEXT):
        return f"`{call} --evaluate --eval-data ...`"
    near = difflib.get_close_matches(plain, known, n=1)
    return f"did you mean {near[0]}?" if near else f"nothing measures it; measured were {', '.join(sorted(known))}"


Pairs = Iterator[tuple[str, Value]]


def _judged_state(result: Mapping[str, Any]) -> str:
    """A job calls it `pruned`, an evaluation of a folder `model`."""
    return "pruned" if "bare_drop" in next(iter(_ppl(result).values())) else "model"


def _ppl(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    return result["ppl"] if "ppl" in result else result["perplexity"]


def _not_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of names of which the two have different things in mind."""
    apart: tuple[str, ...] = () if _texts(one) == _texts(other) else _ON_TEXT
    if _parts(one) != _parts(other):
        # A part is known by its name and the number of its tokens; what it is was stated in a file.
        apart += ("slice_", "worst_slice_ratio")
    return apart if set(counted_tasks(one)) == set(counted_tasks(other)) else (*apart, f"zero_shot{_DROP}")


def _texts(result: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What was measured on, by corpus."""
    return {
        corpus: (about["fingerprint"], about["num_windows"], about["block_tokens"])
        for corpus, about in result["corpora"].items()
    }


def _parts(result: Mapping[str, Any]) -> dict[tuple[str, str], int | None]:
    """The number of tokens of each part, by corpus and name."""
    slices = (result.get("slices") or {}).items()
    return {(corpus, name): row.get("num_tokens") for corpus, rows in slices for name, row in rows.items()}


def _on_text(result: Mapping[str, Any], state: str) -> Pairs:
    ratios, losses = {}, {}
    for corpus, ppl in _ppl(result).items():
        losses[corpus] = math.log(ppl[state])
        yield f"ppl/{corpus}", ppl[state]
        yield f"loss/{corpus}", losses[corpus]
        if "dense" in ppl:
            ratios[corpus] = ppl[state] / ppl["dense"]
            yield f"ppl_ratio/{corpus}", ratios[corpus]
    yield "loss", _worst(losses.values())
    if ratios:
        yield "ppl_ratio", _worst(ratios.values())
    found = {corpus: row[state] for corpus, row in (result.get("fidelity") or {}).items() if state in row}
    for name, extreme in (("kl", max), ("top1", min)):
        for corpus, row in found.items():
            yield f"{name}/{corpus}", row[name]
        if found:
            yield name, _worst((row[name] for row in found.values()), extreme)


def _on_slices(result: Mapping[str, Any], state: str) -> Pairs:
    found: dict[str, list[float]] = {}
    for rows in (result.get("slices") or {}).values():
        for name, row in rows.items():
            for kind, value in _of_slice(row, state):
                found.setdefault(f"slice_{kind}/{name}", []).append(value)
    for name, values in found.items():
        yield name, _worst(values, min if name.startswith("slice_top1/") else max)
    if result.get("worst_slice"):
        yield "worst_slice_ratio", result["worst_slice"]["ratio"]


def _of_slice(row: Mapping[str, Any], state: str) -> Iterator[tuple[str, float]]:
    ppl = row["ppl"]
    yield "loss", math.log(ppl[state])
    if "dense" in ppl:
        yield "ratio", ppl[state] / ppl["dense"]
    for kind in ("kl", "top1", "repetition"):
        if state in row.get(kind, {}):
            yield kind, row[kind][state]


def _worst(values: Iterable[float], extreme: Callable[[Iterable[float]], float] = max) -> float:
    """What is no number is worse than any; `max` and `min` alone would pass over it."""
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else extreme(numbers)


def _on_tasks(result: Mapping[str, Any], state: str) -> Pairs:
    drops = {}
    for task, by_state in (result.get("tasks") or {}).items():
        ours, dense = accuracy(by_state[state]), accuracy(by_state.get("dense", {}))
        if ours is not None:
            yield f"zero_shot/{task}", ours
        if ours is not None and dense is not None:
            drops[task] = dense - ours
            yield f"zero_shot/{task}{_DROP}", drops[task]
    counted = [drops[task] for task in counted_tasks(result) if task in drops]
    if counted:
        yield f"zero_shot{_DROP}", _worst(counted)


def _of_size(result: Mapping[str, Any], state: str) -> Pairs:
    if result.get("size_gib"):
        yield "size_gib", result["size_gib"][state]
    names = {"parameters": "parameters_ratio", "size_gib": "size_ratio", "kv_cache_bytes_per_token": "kv_cache_ratio"}
    for key, name in names.items():
        by_state = result.get(key) or {}
        if by_state.get("dense"):
            yield name, by_state[state] / by_state["dense"]


def _of_speed(result: Mapping[str, Any], state: str) -> Pairs:
    names = {"prompt_tokens_per_s": "speedup", "generation_tokens_per_s": "generation_speedup"}
    for key, name in names.items():
        by_state = result["speed"].get(key) or {}
        if by_state.get(state) and by_state.get("dense"):
            yield name, by_state[state] / by_state["dense"]


def _of_generation(result: Mapping[str, Any], state: str) -> Pairs:
    for name, value in (result.get("generation") or {}).get(state, {}).items():
        if value is not None:
            yield name, value


def _compared(name: str, ours: float, theirs: float) -> float:
    if name.endswith(_DROP):
        # Both are lost accuracy; the quotient of two small losses says nothing.
        return ours - theirs
    if theirs == 0:
        # Neither has any, as of repetition: the same. From none to some there is no quotient.
        return 1.0 if ours == 0 else math.nan
    return ours / theirs

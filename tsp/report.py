"""What a person sees: tables on stdout, and the commands to look further."""

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import yaml
from rich.console import Console
from rich.table import Table

from tsp.console import console
from tsp.masking import masked, masked_tree

if TYPE_CHECKING:
    from tsp.job import Job
    from tsp.sweep import Child


def print_plan(*jobs: "Job", space: dict[str, str] | None = None, stdout: TextIO | None = None) -> None:
    """The resolved config and the plan, as YAML; of a sweep those of each job, of a search also its space."""
    documents = [_plan(job) for job in jobs]
    content = documents[0] if not jobs[0].varied else {"num_jobs": len(jobs), "jobs": documents}
    if space is not None:
        content = {"space": space, **content}
    yaml.safe_dump(masked_tree(content), stdout or sys.stdout, sort_keys=False)


def _plan(job: "Job") -> dict[str, Any]:
    from tsp.plan import as_dict

    return {
        **({"varied": job.varied} if job.varied else {}),
        "plan": as_dict(job.plan),
        "config": job.config.model_dump(mode="json"),
        "deepspeed": json.loads(json.dumps(job.sharding)),
    }


def print_sweep(children: "list[Child]", experiment: str, run_link: str, stdout: TextIO | None = None) -> None:
    """How each job of a sweep ended."""
    out = console(stdout or sys.stdout)
    table = Table(title=f"{len(children)} jobs")
    keys = list(dict.fromkeys(key for child in children for key in child.varied))
    for key in keys:
        table.add_column(key.rpartition(".")[2])
    for heading in ("status", "run", "reason"):
        table.add_column(heading, overflow="fold")
    for child in children:
        values = (str(child.varied.get(key, "")) for key in keys)
        table.add_row(*values, child.status.lower(), child.run_id or "-", child.reason or "")
    out.print(table)
    out.print(f"compare     tsp compare {shlex.quote(experiment)} --report comparison.html", soft_wrap=True)
    out.print(f"look        tsp ui   # then {run_link}", soft_wrap=True)


def print_result(result: dict[str, Any], run_link: str, store_uri: str, stdout: TextIO | None = None) -> None:
    """Dense, bare drop and pruned side by side, in int8 too where asked for, and what to do next."""
    out = console(stdout or sys.stdout)
    dropped = result["dropped"]
    kept = result["num_layers"] - len(dropped)
    table = Table(title=f"{result['model']} without layers {', '.join(map(str, dropped)) or 'none'}")
    for heading in (
        "",
        "layers",
        "parameters",
        *(f"ppl {corpus}" for corpus in result["perplexity"]),
        "GiB",
        "tokens/s",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    speeds, sizes = result["speed"]["prompt_tokens_per_s"], result["size_gib"]
    # Beside int8 only what was loaded like it can be compared: without shards.
    plain = result["speed"].get("plain_prompt_tokens_per_s")
    for state in speeds:
        whole = state in ("dense", "quantized")
        layers, parameters = (
            result["num_layers"] if whole else kept,
            result["parameters"]["dense" if whole else "pruned"],
        )
        ppls = [
            f"{row[state]:.2f}{_times_dense(result, corpus, state)}" for corpus, row in result["perplexity"].items()
        ]
        size, speed = _cell(sizes.get(state), ".4f"), _cell((plain or speeds).get(state), ",.0f")
        table.add_row(_spoken(state), str(layers), f"{parameters:,}", *ppls, size, speed)
    out.print(table)
    out.print("in brackets: times the dense model's perplexity, 95 % bootstrap interval over the windows")
    _print_curve(out, result)
    _print_details(out, result)
    steps = {"checkpoint": result["checkpoint"]} if result["checkpoint"] else {}
    if result["quantized_checkpoint"]:
        steps["in int8"] = result["quantized_checkpoint"]
    steps |= {"look": f"tsp ui   # then {run_link}"}
    if result["registered"]:
        name, version = result["registered"]["name"], result["registered"]["version"]
        steps["registered"] = f"models:/{name}/{version}" if version else f"{name}: not yet, `tsp sync` does it"
    if result["registered"] and version:
        steps |= {
            "in Python": f"import mlflow; mlflow.set_tracking_uri({masked(store_uri)!r})",
            "load": f"mlflow.transformers.load_model('models:/{name}/{version}')",
            "promote": f"tsp promote {shlex.quote(name)} {version} --require 'ppl_ratio<=1.10'",
        }
    for step, text in steps.items():
        out.print(f"{step:<11} {text}", soft_wrap=True)


def _print_curve(out: Console, result: dict[str, Any]) -> None:
    """What was measured for each number of layers that a search under a bound tried."""
    rows = result["curve"]
    if not rows:
        return
    spoken = {
        "speedup": "prompt, times as fast",
        "ppl_ratio_bare": "bare drop, ppl times dense",
        "ppl_ratio": "after the transfer",
    }
    names = [name for name in spoken if any(name in row for row in rows)]
    table = Table(title="numbers of layers that were tried")
    for heading in ("layers dropped", *(spoken[name] for name in names), ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        mark = "chosen" if row["num_drop"] == result["num_drop"] else ""
        table.add_row(str(row["num_drop"]), *(_cell(row.get(name), ".4f") for name in names), mark)
    out.print(table)


def _times_dense(result: dict[str, Any], corpus: str, state: str) -> str:
    if state == "dense":
        return ""
    return f" ({_between(result['ppl_ratio_interval'][corpus][state], '.2f')})"


def print_evaluation(result: dict[str, Any], stdout: TextIO) -> None:
    """What `tsp evaluate` found: a line per corpus, then what else was measured."""
    out = console(stdout)
    compared = result["against"] is not None
    title = f"{result['model']} against {result['against']}" if compared else result["model"]
    table = Table(title=title)
    headings = ("corpus", "perplexity", *(("times dense", "KL", "same top 1") if compared else ()), "windows")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "corpus" else "right")
    for corpus, row in result["perplexity"].items():
        cells = [f"{row['ppl']:.4f} ({_between(result['ppl_interval'][corpus]['model'], '.2f')})"]
        if compared:
            ratio = row["ppl"] / result["ppl"][corpus]["dense"]
            cells.append(f"{ratio:.3f} ({_between(result['ppl_ratio_interval'][corpus]['model'], '.3f')})")
            cells += _fidelity_cells(result["fidelity"][corpus].get("model"))
        table.add_row(corpus, *cells, f"{row['num_windows']} x {row['block_tokens']}")
    out.print(table)
    out.print("in brackets: 95 % bootstrap interval over the windows")
    states = [state for state in ("dense", "model") if state in result["parameters"]]
    _print_slices(out, result, states, judged="model")
    _print_tasks(out, result, states)
    table = Table(title="cost and generation")
    for heading in ("", *states):
        table.add_column(heading, justify="right" if heading else "left")
    for name, by_state, form in _costs(result):
        if any(by_state.get(state) is not None for state in states):
            table.add_row(name, *(_cell(by_state.get(state), form) for state in states))
    out.print(table)
    out.print(f"peak memory by rank: {', '.join(f'{gib:.2f} GiB' for gib in result['peak_memory_gib'])}")


def _print_details(out: Console, result: dict[str, Any]) -> None:
    """Beside the main table of a job: nearness to the dense model, slices, tasks."""
    states = list(result["speed"]["prompt_tokens_per_s"])
    table = Table(title="nearness to the dense model")
    corpora = [corpus for corpus, row in result["fidelity"].items() if row]
    for heading in ("", *(f"{name} {corpus}" for corpus in corpora for name in ("KL", "same top 1"))):
        table.add_column(heading, justify="right" if heading else "left")
    generation = result["generation"]
    for heading in ("repeats itself", "writes the same") if generation else ():
        table.add_column(heading, justify="right")
    for state in states:
        cells = [cell for corpus in corpora for cell in _fidelity_cells(result["fidelity"][corpus].get(state))]
        if generation:
            cells += [_cell(generation[state][name], ".1%") for name in ("repetition", "agreement")]
        table.add_row(_spoken(state), *cells)
    if len(table.columns) > 1:
        out.print(table)
    _print_slices(out, result, states, judged="pruned")
    _print_tasks(out, result, states)


def _print_slices(out: Console, result: dict[str, Any], states: list[str], judged: str) -> None:
    """The worst on top, where there is something to compare with."""
    rows = [(corpus, name, row) for corpus, found in result["slices"].items() for name, row in found.items()]
    if not rows:
        return
    compared = "dense" in states and judged != "dense"
    if compared:
        rows.sort(key=lambda row: -row[2]["ppl"][judged] / row[2]["ppl"]["dense"])
    table = Table(title="slices, the worst first" if compared else "slices")
    headings = ["corpus", "slice", "tokens", *(f"ppl {_spoken(state)}" for state in states)]
    for heading in (*headings, *(("times dense", "KL", "same top 1") if compared else ())):
        table.add_column(heading, justify="left" if heading in ("corpus", "slice") else "right")
    for corpus, name, row in rows:
        cells = [f"{row['num_tokens']:,}", *(f"{row['ppl'][state]:.2f}" for state in states)]
        if compared:
            ratio, interval = row["ppl"][judged] / row["ppl"]["dense"], row["ratio_interval"].get(judged)
            cells.append(f"{ratio:.2f} ({_between(interval, '.2f') if interval else 'one window'})")
            found = {"kl": row["kl"][judged], "top1": row["top1"][judged]} if judged in row["kl"] else None
            cells += _fidelity_cells(found)
        table.add_row(corpus, name, *cells)
    out.print(table)


def _print_tasks(out: Console, result: dict[str, Any], states: list[str]) -> None:
    if not result["tasks"]:
        return
    table = Table(title="tasks")
    for heading in ("task", "metric", *map(_spoken, states)):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, by_state in result["tasks"].items():
        for metric in by_state[states[-1]]:
            if "_stderr" not in metric:
                table.add_row(task, metric, *(_with_error(by_state[state], metric) for state in states))
    out.print(table)


def _with_error(row: dict[str, float], metric: str) -> str:
    name, dot, kind = metric.partition(".")
    error = row.get(f"{name}_stderr{dot}{kind}")
    return f"{row[metric]:.4f}" + (f" +- {error:.4f}" if error is not None else "")


def _costs(result: dict[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """Name, value by state, and how it is written."""
    generation = result["generation"]
    return [
        ("parameters", result["parameters"], ","),
        ("weights on disk, GiB", result["size_gib"], ".4f"),
        ("cache, bytes per token", result["kv_cache_bytes_per_token"], ",.0f"),
        ("prompt, tokens/s", result["speed"]["prompt_tokens_per_s"], ",.0f"),
        ("generation, tokens/s", result["speed"]["generation_tokens_per_s"], ",.0f"),
        ("repeats itself", {state: row["repetition"] for state, row in generation.items()}, ".1%"),
        ("writes the same as dense", {state: row["agreement"] for state, row in generation.items()}, ".1%"),
    ]


def _fidelity_cells(found: dict[str, float] | None) -> list[str]:
    return ["-", "-"] if found is None else [f"{found['kl']:.4f}", f"{found['top1']:.1%}"]


def _spoken(state: str) -> str:
    return state.replace("_", " ")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _between(interval: Sequence[float], form: str) -> str:
    low, high = interval
    return f"{low:{form}} to {high:{form}}"


def print_verification(rows: list[dict[str, Any]], stdout: TextIO) -> None:
    """One line per check of `tsp verify`."""
    table = Table()
    for heading in ("check", "", "found"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row["name"], "ok" if row["ok"] else "FAILED", row["found"])
    console(stdout).print(table)


def print_checks(checks: list[dict[str, Any]], stdout: TextIO) -> None:
    """One line per check of `tsp doctor`."""
    table = Table()
    for heading in ("check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(check["name"], check["found"], "ok" if check["ok"] else check["advice"])
    console(stdout).print(table)

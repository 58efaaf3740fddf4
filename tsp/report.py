"""What a person sees: tables on stdout, and the commands to look further."""

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any, TextIO

import yaml
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tsp.job import Job
    from tsp.sweep import Child


def print_plan(*jobs: "Job", stdout: TextIO | None = None) -> None:
    """The resolved config and the plan, as YAML; of a sweep those of each job."""
    documents = [_plan(job) for job in jobs]
    content = documents[0] if not jobs[0].varied else {"num_jobs": len(jobs), "jobs": documents}
    yaml.safe_dump(content, stdout or sys.stdout, sort_keys=False)


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
    console = Console(file=stdout or sys.stdout, highlight=False)
    table = Table(title=f"{len(children)} jobs")
    keys = list(dict.fromkeys(key for child in children for key in child.varied))
    for key in keys:
        table.add_column(key.rpartition(".")[2])
    for heading in ("status", "run", "reason"):
        table.add_column(heading, overflow="fold")
    for child in children:
        values = (str(child.varied.get(key, "")) for key in keys)
        table.add_row(*values, child.status.lower(), child.run_id or "-", child.reason or "")
    console.print(table)
    console.print(f"compare     tsp compare {shlex.quote(experiment)} --report comparison.html", soft_wrap=True)
    console.print(f"look        tsp ui   # then {run_link}", soft_wrap=True)


def print_result(result: dict[str, Any], run_link: str, store_uri: str, stdout: TextIO | None = None) -> None:
    """Dense, bare drop and pruned side by side, and what to do next."""
    console = Console(file=stdout or sys.stdout, highlight=False)
    dropped = result["dropped"]
    kept = result["num_layers"] - len(dropped)
    table = Table(title=f"{result['model']} without layers {', '.join(map(str, dropped)) or 'none'}")
    for heading in ("", "layers", "parameters", *(f"ppl {corpus}" for corpus in result["perplexity"]), "tokens/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for state, layers, parameters in (
        ("dense", result["num_layers"], result["parameters"]["dense"]),
        ("bare drop", kept, result["parameters"]["pruned"]),
        ("pruned", kept, result["parameters"]["pruned"]),
    ):
        key = state.replace(" ", "_")
        ppls = [
            f"{values[key]:.2f}{_times_dense(result, corpus, key)}" for corpus, values in result["perplexity"].items()
        ]
        speed = result["speed"]["prompt_tokens_per_s"][key]
        table.add_row(state, str(layers), f"{parameters:,}", *ppls, f"{speed:,.0f}" if speed else "-")
    console.print(table)
    console.print("in brackets: times the dense model's perplexity, 95 % bootstrap interval over the windows")
    steps = {"checkpoint": result["checkpoint"]} if result["checkpoint"] else {}
    steps |= {"look": f"tsp ui   # then {run_link}"}
    if result["registered"]:
        name, version = result["registered"]["name"], result["registered"]["version"]
        steps |= {
            "registered": f"models:/{name}/{version}",
            "in Python": f"import mlflow; mlflow.set_tracking_uri({store_uri!r})",
            "load": f"mlflow.transformers.load_model('models:/{name}/{version}')",
            "promote": f"mlflow.MlflowClient().set_registered_model_alias({name!r}, 'champion', '{version}')",
        }
    for step, text in steps.items():
        console.print(f"{step:<11} {text}", soft_wrap=True)


def _times_dense(result: dict[str, Any], corpus: str, state: str) -> str:
    if state == "dense":
        return ""
    low, high = result["ppl_ratio_interval"][corpus][state]
    return f" ({low:.2f} to {high:.2f})"


def print_evaluation(result: dict[str, Any], stdout: TextIO) -> None:
    """One line per corpus."""
    table = Table(title=result["model"])
    for heading in ("corpus", "perplexity", "windows", "tokens each"):
        table.add_column(heading, justify="left" if heading == "corpus" else "right")
    for corpus, row in result["perplexity"].items():
        table.add_row(corpus, f"{row['ppl']:.4f}", str(row["num_windows"]), str(row["block_tokens"]))
    Console(file=stdout).print(table)


def print_verification(rows: list[dict[str, Any]], stdout: TextIO) -> None:
    """One line per check of `tsp verify`."""
    table = Table()
    for heading in ("check", "", "found"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row["name"], "ok" if row["ok"] else "FAILED", row["found"])
    Console(file=stdout).print(table)


def print_checks(checks: list[dict[str, Any]], stdout: TextIO) -> None:
    """One line per check of `tsp doctor`."""
    table = Table()
    for heading in ("check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(check["name"], check["found"], "ok" if check["ok"] else check["advice"])
    Console(file=stdout).print(table)

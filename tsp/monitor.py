"""`tsp monitor`: a pruned model in use, measured on what it is asked there, against another one.

    asked = read_asked(Path("policy.yaml"), ["kl<=0.1"])
    look = take_look("models:/NAME@champion", "dense", Path("requests.jsonl"), asked, ...)   # on every rank
    document = write_down(look, Path.cwd())                                                 # on the first
    refuse_broken(document)

The measures are those of `tsp evaluate`, the names of values those of `evidence.py`.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.config import ModelConfig, flatten, load_config, merged, parse_override
from tsp.errors import ConfigError, DataError, ModelError, MonitoringError
from tsp.evaluate import evaluate_model
from tsp.evidence import measured_of
from tsp.policy import (
    MONITOR,
    VS_CHAMPION,
    Requirement,
    Value,
    Verdict,
    judge,
    read_policy,
    read_requirement,
    required_of,
)
from tsp.remeasure import base_model
from tsp.tracking.fetch import split_uri
from tsp.tracking.monitoring import record
from tsp.tracking.spool import now_ms
from tsp.tracking.versions import evidence_of, find_version, registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

SCHEMA = 1
DENSE = "dense"
"""As what to compare with: the model that the version was made from."""

_SETTINGS: dict[str, Any] = {"eval": {"prompts": 32, "speed_runs": 0}}
"""What differs from those of `tsp evaluate`: enough continuations for each slice, and no timing beside other work."""
_OF_THE_LOOK = ("model.path", "eval.sources", "eval.slices")
"""Settings that are the command's own words: MODEL, `--requests`, `--slices`."""
_WATCHED = ("kl", "top1", "loss", "ppl_ratio", "worst_slice_ratio", "repetition", "agreement")
_SLICE = "slice_"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the model in use has to keep."""

    requirements: tuple[Requirement, ...]
    policy: str
    """File and hash; empty: all came with the command."""


def read_asked(policy: Path | None, texts: Sequence[str]) -> Asked:
    """The requirements of `--policy` (its key `monitor`) and of each `--require`.

    Raises:
        ConfigError: one cannot be read, or is for promotions only; the policy says nothing of `monitor`.
    """
    read = None if policy is None else read_policy(policy)
    rows = [*(required_of(read, MONITOR) if read else ()), *map(read_requirement, texts)]
    for row in rows:
        if row.name.startswith(VS_CHAMPION):
            raise ConfigError(
                f"requirement {row} is for promotions: here all is relative to --against; "
                f"write it as {str(row).removeprefix(VS_CHAMPION)}"
            )
    return Asked(requirements=tuple(rows), policy=f"{read.source} {read.hash}" if read else "")


def take_look(
    model: str,
    against: str,
    requests: Path,
    asked: Asked,
    *,
    slices: str | None,
    overrides: Sequence[str],
    ds_path: Path | None,
    root: Path,
    world_size: int,
) -> dict[str, Any]:
    """Measure a registered version on requests and judge it; the same call on every rank.

    Args:
        model: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        against: another such, `dense`, or a hub id or folder.
        requests: .jsonl with rows of `text` or `messages`.
        asked: what it has to keep.
        slices: YAML of the parts to measure alone; None: none.
        overrides: `--set`, of the config.
        ds_path: DeepSpeed JSON that says how to shard; None: every rank holds the whole model.
        root: working directory.
        world_size: ranks; they share the windows.

    Returns:
        The document of `--json`, but for what `write_down` adds.

    Raises:
        TspError: with exit code 2 for a model, text or setting that cannot be used.
    """
    started_ms = now_ms()
    if not requests.is_file():
        raise DataError(f"--requests {requests}: no such file; give a .jsonl file with rows of `text` or `messages`")
    stated = [*map(parse_override, overrides)]
    for key in flatten(merged(stated)):
        if key in _OF_THE_LOOK:
            raise ConfigError(f"--set {key} would measure something else than what is asked for; leave it out")
    version, watched, reference = _models(model, against, root)
    of_look: dict[str, Any] = {
        "model": watched.model_dump(),
        "eval": {"sources": [str(requests)], "slices": slices},
    }
    config = load_config([_SETTINGS, of_look, *stated])
    result = evaluate_model(config, ds_path, root=root, world_size=world_size, against=reference)
    measured = measured_of(result)
    verdicts = judge(
        asked.requirements, measured, first=False, how_to_measure=lambda name: _how_to_measure(name, measured)
    )
    (about,) = result["corpora"].values()
    return {
        "schema": SCHEMA,
        "model": model,
        "name": version.name,
        "version": str(version.version),
        "against": result["against"],
        "requests": {"file": str(requests)} | about,
        "slices": slices,
        "started_ms": started_ms,
        "policy": asked.policy,
        "verdict": _verdict(verdicts),
        "requirements": [asdict(one) for one in verdicts],
        "measured": measured,
        "evaluation": result,
    }


def write_down(look: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Make a run of a look; the document with its `run_id`, `step` and `link`.

    Raises:
        TrackingError: the store does not take it.
    """
    requests = look["requests"]
    tags = {
        "model": look["name"],
        "version": look["version"],
        "named": look["model"],
        "against": look["against"],
        "requests": Path(requests["file"]).name,
        "requests_fingerprint": requests["fingerprint"],
        "policy": look["policy"],
        "verdict": look["verdict"],
    }
    return record(
        root,
        look["name"],
        look,
        metrics=dict(_metrics(look["measured"])),
        verdicts=[Verdict(**row) for row in look["requirements"]],
        tags=tags,
        title=f"version {look['version']} on {tags['requests']}: {look['verdict']}",
        started_ms=look["started_ms"],
    )


def refuse_broken(document: Mapping[str, Any]) -> None:
    """Raise MonitoringError where a requirement is not kept."""
    rows = [Verdict(**row) for row in document["requirements"]]
    broken = [row for row in rows if not row.passes]
    if broken:
        found = "; ".join(f"{row.requirement} ({row.note or f'measured {row.measured}'})" for row in broken)
        raise MonitoringError(
            f"{document['name']} version {document['version']} does not keep {len(broken)} of {len(rows)} "
            f"requirements: {found}"
        )


def _pinned(version: "ModelVersion") -> str:
    return f"models:/{version.name}/{version.version}"


def _models(model: str, against: str, root: Path) -> "tuple[ModelVersion, ModelConfig, ModelConfig]":
    """What is watched, how it is read, and what it is compared with. An alias may move while we measure: from here on
    it is the version.
    """
    with registry(root) as client:
        version = find_version(client, *split_uri(model))
        base = base_model(version, evidence_of(client, version))
        watched = ModelConfig(path=_pinned(version), trust_remote_code=base is not None and base.trust_remote_code)
        if against == DENSE:
            if base is None:
                raise ModelError(
                    f"{watched.path} comes from no job with a result.json that says what it was made from; give the "
                    "dense model itself: --against MODEL"
                )
            return version, watched, base
        if against.startswith("models:/"):
            against = _pinned(find_version(client, *split_uri(against)))
            if against == watched.path:
                raise ConfigError(f"--against is {against}, the version that is watched; give another one")
    return version, watched, watched.model_copy(update={"path": against})


def _verdict(verdicts: Iterable[Verdict]) -> str:
    passes = [one.passes for one in verdicts]
    if not passes:
        return "nothing required"
    return "kept" if all(passes) else "broken"


def _metrics(measured: Mapping[str, Value]) -> Iterator[tuple[str, float]]:
    """For MLflow. What is called by the file's name is left out: tomorrow's requests are another file."""
    for name, value in measured.items():
        kind, _, part = name.partition("/")
        if isinstance(value, str):
            continue
        if kind.startswith(_SLICE):
            yield f"monitor/{part}/{kind.removeprefix(_SLICE)}", value
        elif name in _WATCHED or kind == "zero_shot":
            yield f"monitor/{name}", value


def _how_to_measure(name: str, known: Mapping[str, Value]) -> str:
    """What somebody does who wants a value that is not there."""
    near = difflib.get_close_matches(name, known, n=1)
    slices = [one.removeprefix("slice_loss/") for one in known if one.startswith("slice_loss/")]
    if name.startswith((_SLICE, "worst_slice")) and not slices:
        return "give --slices FILE.yaml"
    if name.startswith(_SLICE) and name.partition("/")[2] in slices:
        return "too little of it was compared: give more requests, or --set eval.compare_positions=N, eval.prompts=N"
    if name.startswith("zero_shot"):
        return "give --set eval.tasks=[TASK]"
    if name in ("speedup", "generation_speedup"):
        return f"give --set eval.{'speed' if name == 'speedup' else 'generation'}_runs=10"
    return f"did you mean {near[0]}?" if near else f"nothing measures it; measured were {', '.join(sorted(known))}"

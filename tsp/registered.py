"""Registered models told in full: what a version was made from and how, what was measured, and two of them compared.

with registry(Path.cwd()) as client:
    rows = overview(client, None)
    one = describe(client, find(client, "demo-pruned@champion"))
    both = compare(client, "demo-pruned@champion", "demo-pruned/3")
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tsp.errors import ModelError
from tsp.evidence import Measured, measured_of, relative_to
from tsp.policy import VS_CHAMPION
from tsp.tracking.versions import Evidence, evidence_of, find_version, model_names, run_link, versions_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_MADE = ("base_model", "base_revision", "method", "transfer", "num_layers", "dropped", "calibration", "corpora")
"""What two versions may differ in, beside their settings and what was measured."""


def find(client: "MlflowClient", text: str) -> "ModelVersion":
    """A version by `NAME@ALIAS`, `NAME/VERSION`, or `NAME` for its newest, with `models:/` before it or not.

    Raises:
        ModelError: it is none of these, or there is none.
    """
    match = re.fullmatch(r"(?:models:/)?([^/@]+)(?:@([^/@]+)|/(\d+))?", text)
    if match is None:
        raise ModelError(f"a registered model is named NAME, NAME@ALIAS or NAME/VERSION, got {text!r}")
    return find_version(client, match[1], match[2] or match[3])


def overview(client: "MlflowClient", name: str | None) -> list[dict[str, Any]]:
    """All versions of one model, or of all, as `describe` tells them without the settings; the newest of each first.

    Raises:
        ModelError: no such model.
    """
    names = model_names(client) if name is None else [name]
    found = [version for one in names for version in reversed(versions_of(client, one))]
    return [{key: value for key, value in describe(client, one).items() if key != "settings"} for one in found]


def describe(client: "MlflowClient", version: "ModelVersion") -> dict[str, Any]:
    """All that is known of a version.

    Returns:
        `{model, version, aliases, created_ms, run_id, link, base_model, base_revision, method, transfer, num_layers,
        dropped, calibration, corpora, measured, evidence, settings}`; what is not known is None or empty, as of a
        version that no job of ours has made. `measured` holds the latest values by the names of `evidence.py`.
    """
    evidence = evidence_of(client, version)
    job: Mapping[str, Any] = next((one.document for one in evidence if "settings" in one.document), {})
    return {
        "model": version.name,
        "version": str(version.version),
        "aliases": list(version.aliases),
        "created_ms": version.creation_timestamp,
        "run_id": version.run_id or None,
        "link": run_link(client, version.run_id) if version.run_id else None,
        "base_model": job.get("model") or version.tags.get("base_model"),
        "base_revision": version.tags.get("base_revision") or None,
        **{key: job.get(key) for key in ("method", "transfer", "num_layers", "dropped", "calibration")},
        "corpora": {corpus: about for one in evidence for corpus, about in one.document["corpora"].items()},
        "measured": _measured(evidence),
        "evidence": [one.run_id for one in evidence],
        "settings": job.get("settings", {}),
    }


def compare(client: "MlflowClient", first: str, second: str) -> dict[str, Any]:
    """Two versions side by side.

    Returns:
        `{a, b, made, settings, measured}`: names, and lists of `{name, a, b}`, of `made` and `settings` what differs
        only. Rows of `measured` have `b_to_a`, too: b / a, of lost accuracies b - a; None where the two were not
        measured on the same text.
    """
    versions = [find(client, text) for text in (first, second)]
    a, b = (describe(client, version) for version in versions)
    ours, theirs = (evidence_of(client, version) for version in versions)
    relative: Measured = {}
    for one in theirs:
        for other in ours:
            relative |= relative_to(other.document, one.document)
    settings = {*a["settings"], *b["settings"]}
    measured = _rows({*a["measured"], *b["measured"]}, a["measured"], b["measured"])
    return {
        "a": f"{a['model']}/{a['version']}",
        "b": f"{b['model']}/{b['version']}",
        "made": _differing(_rows(_MADE, a, b)),
        "settings": _differing(_rows(settings, a["settings"], b["settings"])),
        "measured": [row | {"b_to_a": relative.get(f"{VS_CHAMPION}{row['name']}")} for row in measured],
    }


def _measured(evidence: Sequence[Evidence]) -> Measured:
    """The latest of each value."""
    values: Measured = {}
    for one in evidence:
        values |= measured_of(one.document)
    return values


def _rows(names: Any, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    ordered = names if isinstance(names, tuple) else sorted(names)
    return [{"name": name, "a": a.get(name), "b": b.get(name)} for name in ordered]


def _differing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["a"] != row["b"]]

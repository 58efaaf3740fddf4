"""Evidence for a promotion that the jobs did not give: versions measured again, on the same text, and recorded.

promote(wanted, root=root, measure=partial(remeasure, stated=[nest("eval.tasks", ["piqa"])], root=root))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.config import ModelConfig, load_config, nest
from tsp.evaluate import evaluate_model
from tsp.evidence import measured_of
from tsp.tracking.versions import Evidence, evidence_of, record_evaluation

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_SECTIONS = ("data", "eval")
"""What a job measures on."""


def remeasure(
    client: "MlflowClient",
    candidate: "ModelVersion",
    champion: "ModelVersion | None",
    *,
    stated: Sequence[Mapping[str, Any]],
    root: Path,
) -> None:
    """Measure a candidate against its dense model, and the version that has the alias against its own, alike.

    Args:
        client: of the registry.
        candidate: measured as its job did it.
        champion: None: nobody has the alias.
        stated: layers of a config that differ from the candidate's job: `eval.*`, `data.*`.
        root: working directory of the jobs; relative paths of their settings are below it.

    Raises:
        TspError: as `evaluate_model`.
    """
    layers = [*_settings(evidence_of(client, candidate), _SECTIONS), *stated]
    for version in (candidate, champion):
        if version is None:
            continue
        base = base_model(version, evidence_of(client, version))
        trust = base is not None and base.trust_remote_code
        model = {"path": f"models:/{version.name}/{version.version}", "trust_remote_code": trust}
        config = load_config([*layers, {"model": model}])
        document = evaluate_model(config, None, root=root, world_size=1, against=base)
        values = {name: value for name, value in measured_of(document).items() if not isinstance(value, str)}
        record_evaluation(client, version, document, values)


def base_model(version: "ModelVersion", evidence: Sequence[Evidence]) -> ModelConfig | None:
    """The dense model that a version's job has pruned, of the same commit; None: no job of ours has made it."""
    layers = _settings(evidence, ("model",))
    if not layers:
        return None
    config = load_config(layers).model
    return config.model_copy(update={"revision": version.tags.get("base_revision") or config.revision})


def _settings(evidence: Sequence[Evidence], sections: Sequence[str]) -> list[dict[str, Any]]:
    """The sections of the config of a version's job, as layers; none where no job of ours has made it."""
    job = next((one.document for one in evidence if "settings" in one.document), None)
    settings = {} if job is None else job["settings"]
    return [nest(key, value) for key, value in settings.items() if key.partition(".")[0] in sections]

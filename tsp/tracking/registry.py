"""The model registry: a Hugging Face checkpoint folder becomes a version of a registered model.

    name, version = register_checkpoint(tracker.uri, Path("out/model"), "demo-pruned", run_id=tracker.run_id, ...)

`fetch.py` finds it again.

No weights are loaded, and none are copied where the artifact store is on the same disk: they are hard-linked. A version
loads as a transformers pipeline and as a pyfunc; only files of known kinds go in, no pickle (`safety.known_files`).
"""

import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.errors import ModelError
from tsp.files import place
from tsp.masking import masked
from tsp.safety import known_files
from tsp.tracking.manifest import MANIFEST_TAG, write_manifest
from tsp.tracking.refusals import refusals
from tsp.tracking.store import http_limits, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

REQUIREMENTS = ("torch", "transformers", "mlflow", "accelerate")
UPLOAD_TIMEOUT_S = 600
UPLOAD_RETRIES = 3
"""An upload is worth waiting for: a server may be silent for minutes while it passes a shard on to its bucket."""
CHECKPOINT_TAG = "tsp.checkpoint"
"""Of the logged models that are made here."""


def register_checkpoint(
    uri: str,
    checkpoint: Path,
    name: str,
    *,
    run_id: str,
    tags: Mapping[str, str],
    description: str,
    metadata: dict[str, Any],
) -> tuple[str, str]:
    """Register a checkpoint folder as the model that a run has made. The same run again gives the version there is.

    Args:
        uri: tracking URI.
        checkpoint: plain Hugging Face folder with config, safetensors and tokenizer.
        name: registered model; created if it is new.
        run_id: the run that made the checkpoint; it must exist in the store.
        tags: tags of the version, its lineage; the hash of its manifest is added.
        description: text of the version, Markdown.
        metadata: kept in the `MLmodel` file.

    Returns:
        Name and version.

    Raises:
        ModelError: the folder is no complete checkpoint.
        TrackingError: the store refuses or does not answer.
    """
    from mlflow import MlflowClient

    checkpoint = Path(checkpoint).resolve()
    if not (checkpoint / "config.json").is_file():
        raise ModelError(f"{checkpoint} holds no Hugging Face checkpoint: config.json is missing")
    client = MlflowClient(uri)
    with refusals(f"{checkpoint} cannot be registered as {name!r} at {shown(uri)}"), default_store(uri):
        version = _version_of(client, name, run_id)
        if version is None:
            logged, manifest = _log_model(client, checkpoint, name, run_id, metadata)
            version = _create_version(client, logged, name, {**tags, MANIFEST_TAG: manifest}, description)
    return name, version


@contextmanager
def default_store(uri: str) -> Iterator[None]:
    """Make `uri` mlflow's default store inside the block, and be patient with it.

    mlflow 3.17: the sqlite registry looks a logged model up in the default store, whatever store its client was made
    for; and mlflow's own context manager forgets the user's MLFLOW_TRACKING_URI on leaving.
    """
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    given = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        with _use_tracking_uri(uri), http_limits(timeout_s=UPLOAD_TIMEOUT_S, retries=UPLOAD_RETRIES):
            yield
    finally:
        if given is not None:
            os.environ["MLFLOW_TRACKING_URI"] = given


def _log_model(
    client: "MlflowClient", checkpoint: Path, name: str, run_id: str, metadata: dict[str, Any]
) -> "tuple[LoggedModel, str]":
    """The checkpoint as a logged model of the run, complete or FAILED; and the hash of its manifest."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    experiment_id = client.get_run(run_id).info.experiment_id
    # A registered model may have a dot in its name, a logged one may not.
    logged_name = re.sub(r"[^\w+ -]", "_", name)
    tags = {CHECKPOINT_TAG: "true"}
    logged = client.create_logged_model(experiment_id, logged_name, run_id, tags, model_type="causal-lm")
    try:
        location = logged.artifact_location
        if is_local_uri(location):
            manifest = _build(Path(local_file_uri_to_path(location)), checkpoint, name, logged, metadata)
        else:
            # Beside the checkpoint, so that the staging folder can be linked too.
            with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".register-") as staging:
                manifest = _build(Path(staging), checkpoint, name, logged, metadata)
                client.log_model_artifacts(logged.model_id, staging)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
        return client.finalize_logged_model(logged.model_id, "READY"), manifest
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise


def _build(out: Path, checkpoint: Path, name: str, logged: "LoggedModel", metadata: dict[str, Any]) -> str:
    """Lay out an MLflow model folder: `model/`, `components/tokenizer/`, the environment, `MLmodel`, the manifest."""
    import mlflow.pyfunc
    import transformers
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    (out / "model").mkdir(parents=True, exist_ok=True)
    for path in known_files(checkpoint):
        place(path, out / "model" / path.name)
    # Where Python code is handed on, the job had leave to run it.
    code = any(path.suffix == ".py" for path in known_files(checkpoint))
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=code)
    tokenizer.save_pretrained(out / "components" / "tokenizer")
    _write_environment(out)
    text = Schema([ColSpec("string")])
    # What a request may change; mlflow ignores others.
    asked = ParamSchema([ParamSpec("max_new_tokens", "integer", 64), ParamSpec("do_sample", "boolean", False)])
    model = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        signature=ModelSignature(inputs=text, outputs=text, params=asked),
        metadata=metadata,
        model_size_bytes=sum(path.stat().st_size for path in known_files(checkpoint)),
    )
    model.add_flavor(
        "transformers",
        transformers_version=transformers.__version__,
        code=None,
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=json.loads((checkpoint / "config.json").read_text())["architectures"][0],
        source_model_name=name,
        model_binary="model",
        components=["tokenizer"],
        tokenizer_type=type(tokenizer).__name__,
        torch_dtype=None,
    )
    environment = {"conda_env": "conda.yaml", "python_env": "python_env.yaml"}
    mlflow.pyfunc.add_to_model(model, loader_module="mlflow.transformers", **environment)
    model.save(str(out / "MLmodel"))
    return write_manifest(out)


def _write_environment(out: Path) -> None:
    """requirements.txt, python_env.yaml and conda.yaml, pinned to what runs here."""
    import yaml

    # A local build tag ("2.13.0+cpu") is on no package index.
    requirements = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]
    python = ".".join(map(str, sys.version_info[:3]))
    (out / "requirements.txt").write_text("\n".join(requirements) + "\n")
    (out / "python_env.yaml").write_text(
        yaml.safe_dump({"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]})
    )
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": requirements}],
    }
    (out / "conda.yaml").write_text(yaml.safe_dump(conda))


def _version_of(client: "MlflowClient", name: str, run_id: str) -> str | None:
    """The newest version that a run has made."""
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return str(max(int(version.version) for version in versions)) if versions else None


def _create_version(
    client: "MlflowClient", logged: "LoggedModel", name: str, tags: Mapping[str, str], description: str
) -> str:
    """Number of a new version of the registered model `name`."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run_id = str(logged.source_run_id)
    try:
        # mlflow would repeat what got no answer, and make a second version of what had gone through.
        with http_limits(timeout_s=UPLOAD_TIMEOUT_S, retries=0):
            version = client.create_model_version(
                name,
                source=logged.model_uri,
                run_id=run_id,
                tags={key: masked(str(value)) for key, value in tags.items()},
                description=masked(description),
                model_id=logged.model_id,
            )
        return str(version.version)
    except MlflowException:
        made = _version_of(client, name, run_id)
        if made is None:
            raise
        return made

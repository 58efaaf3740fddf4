"""What the registry knows of a version, and which model it was made from.

version = registered_version("models:/demo-pruned@champion", Path.cwd())
dense = base_of(version, Path.cwd())
"""

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tsp.config import ModelConfig
from tsp.errors import ModelError
from tsp.tracking.store import open_store, resolve_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def registered_version(uri: str, root: Path) -> "ModelVersion":
    """The registry's entry of a version.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        root: working directory; the embedded store is `mlruns/` below it.

    Raises:
        ModelError: no such version.
        TrackingError: the store does not answer.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", uri)
    if match is None:
        raise ModelError(f"a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION, got {uri!r}")
    store = resolve_uri(root)
    open_store(store, root)
    client = MlflowClient(store)
    try:
        if match["version"]:
            return client.get_model_version(match["name"], match["version"])
        return client.get_model_version_by_alias(match["name"], match["alias"])
    except MlflowException as error:
        raise ModelError(f"{uri} is not in the registry at {store}: {str(error).partition(chr(10))[0]}") from error


def base_of(version: "ModelVersion", root: Path) -> ModelConfig:
    """The dense model that a version was made from, as the `result.json` of its job has it.

    Raises:
        ModelError: the job, or its result, is no longer there.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(resolve_uri(root))
    try:
        with tempfile.TemporaryDirectory(prefix="tsp-") as folder:
            content = Path(client.download_artifacts(version.run_id, "result.json", folder)).read_bytes()
        settings = json.loads(content)["settings"]
    except (MlflowException, OSError, ValueError, KeyError):
        named = version.tags.get("base_model")
        hint = f" (its tag base_model says {named})" if named else ""
        raise ModelError(
            f"version {version.version} of {version.name} has no job with a result.json that says what it was made "
            f"from{hint}; give the dense model itself: --against MODEL"
        ) from None
    return ModelConfig(
        path=settings["model.path"],
        # The commit that the job has read, where it was on the hub.
        revision=version.tags.get("base_revision") or settings["model.revision"],
        dtype=settings["model.dtype"],
        trust_remote_code=settings["model.trust_remote_code"],
    )

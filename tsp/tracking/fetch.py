"""A registered version as a folder on this machine, where the store has it on this disk, or fetched once.

folder = checkpoint_path("models:/demo-pruned/1", Path.cwd())
"""

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tsp.config import ModelConfig
from tsp.errors import ModelError
from tsp.tracking.existing import existing_store
from tsp.tracking.manifest import download_name
from tsp.tracking.refusals import refusals
from tsp.tracking.registry import default_store
from tsp.tracking.store import mlruns_folder, open_store, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient


def checkpoint_path(uri: str, root: Path) -> Path:
    """Local folder of the Hugging Face checkpoint of a registered version.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        root: working directory of the job. A version in a remote store is downloaded once, to `mlruns/cache` below it.

    Raises:
        ConfigError, ModelError: no store, no such version, or it holds no Hugging Face checkpoint.
        TrackingError: the store does not answer.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    name, wanted = split_uri(uri)
    store = existing_store(root)
    open_store(store, root)
    client = MlflowClient(store)
    with refusals(f"{uri} cannot be fetched from {shown(store)}"), default_store(store):
        try:
            version = wanted if wanted.isdigit() else client.get_model_version_by_alias(name, wanted).version
            folder = _fetch(client, name, str(version), root)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{uri} is not in the registry at {shown(store)}: {reason}") from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{uri} holds no Hugging Face checkpoint: {folder / 'config.json'} is missing")
    return folder


def split_uri(uri: str) -> tuple[str, str]:
    """Name, and alias or number, of `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ModelError: it is neither.
    """
    match = re.fullmatch(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))", uri)
    if match is None:
        raise ModelError(f"a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION, got {uri!r}")
    return match["name"], match["alias"] or match["version"]


def located(config: ModelConfig, root: Path) -> ModelConfig:
    """The config with `models:/name@alias` or `models:/name/version` replaced by the folder of that version."""
    if config.path is None or not config.path.startswith("models:/"):
        return config
    return config.model_copy(update={"path": str(checkpoint_path(config.path, root))})


def _fetch(client: "MlflowClient", name: str, version: str, root: Path) -> Path:
    """Local folder of the checkpoint of a version; downloaded, whole or not at all, if its store is remote."""
    import mlflow.artifacts
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    location = client.get_model_version_download_uri(name, version)
    if is_local_uri(location):
        return Path(local_file_uri_to_path(location)) / "model"
    known = client.get_model_version(name, version)
    cache = mlruns_folder(root) / "cache" / download_name(known, client.tracking_uri)
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".download-") as folder:
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location.rstrip('/')}/model", dst_path=folder, tracking_uri=client.tracking_uri
            )
            try:
                os.replace(Path(folder) / "model", cache)
            except OSError:
                if not cache.is_dir():  # Another rank was faster.
                    raise
    with suppress(OSError):  # It may be another user's.
        os.utime(cache)  # It is used: see `leftovers.py`.
    return cache

"""SHA-256 of every file of a registered model: written down when it is registered, compared before it is relied upon.

    tag = write_manifest(folder)
    faults = file_faults(client, version)       # ["model/model.safetensors changed"]

The list lies beside the files as `manifest.json`; the version's tag holds the list's own hash, so that neither can be
changed without the other.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tsp.files import sha256
from tsp.tracking.refusals import refusals

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MANIFEST = "manifest.json"
MANIFEST_TAG = "manifest_sha256"
_COPIED = "model/"
"""Where a registered folder has the Hugging Face checkpoint."""


def write_manifest(folder: Path) -> str:
    """List all files below a folder with their hashes in its `manifest.json`.

    Returns:
        The list's own hash.
    """
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1) + "\n")
    return sha256(folder / MANIFEST)


def download_name(version: "ModelVersion", store: str) -> str:
    """Folder in `mlruns/cache` of a version: other stores have other versions of that name and number.

    So has the same store where a model was deleted and made again, which its files tell.
    """
    known = version.tags.get(MANIFEST_TAG) or hashlib.sha256(store.encode()).hexdigest()
    return f"{version.name}-v{version.version}-{known[:12]}"


def file_faults(client: "MlflowClient", version: "ModelVersion", *, checkpoint: Path | None = None) -> list[str] | None:
    """What of a version's files is not as it was registered; each file is read, and behind a server fetched for it.

    Args:
        client: of the registry.
        version: whose files.
        checkpoint: a copy of its Hugging Face folder, to be looked at instead.

    Returns:
        A line for each file that is gone or changed, or is only in the copy; empty: all are as they were; None: no
        hashes were recorded, by an earlier release or by somebody else.
    """
    recorded = version.tags.get(MANIFEST_TAG)
    if recorded is None:
        return None
    location = client.get_model_version_download_uri(version.name, version.version)
    with _fetched(client, location, MANIFEST) as manifest:
        if manifest is None:
            return [f"{MANIFEST} is gone"]
        if sha256(manifest) != recorded:
            return [f"{MANIFEST} changed"]
        hashes: dict[str, str] = json.loads(manifest.read_text())
    faults = []
    if checkpoint is not None:
        hashes = {name[len(_COPIED) :]: hash for name, hash in hashes.items() if name.startswith(_COPIED)}
        faults = [f"{path.name} was added" for path in checkpoint.iterdir() if path.name not in hashes]
    for name, expected in hashes.items():
        with _fetched(client, location, name) if checkpoint is None else _in(checkpoint, name) as path:
            if path is None:
                faults.append(f"{name} is gone")
            elif sha256(path) != expected:
                faults.append(f"{name} changed")
    return faults


@contextmanager
def _in(folder: Path, name: str) -> Iterator[Path | None]:
    yield folder / name if (folder / name).is_file() else None


@contextmanager
def _fetched(client: "MlflowClient", location: str, name: str) -> Iterator[Path | None]:
    """One file of a version where it can be read; None: it is not there."""
    import mlflow.artifacts
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if is_local_uri(location):
        with _in(Path(local_file_uri_to_path(location)), name) as path:
            yield path
        return
    file, store = f"{location.rstrip('/')}/{name}", client.tracking_uri
    with tempfile.TemporaryDirectory(prefix="tsp-") as folder:
        with refusals(f"{file} cannot be fetched"):
            # mlflow 3.17 reports a download of what is not there as it does any failure.
            listed = mlflow.artifacts.list_artifacts(artifact_uri=file.rpartition("/")[0], tracking_uri=store)
            there = file.rpartition("/")[2] in {info.path.rpartition("/")[2] for info in listed}
            about = {"artifact_uri": file, "dst_path": folder, "tracking_uri": store}
            path = Path(mlflow.artifacts.download_artifacts(**about)) if there else None
        yield path

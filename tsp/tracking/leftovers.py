"""What lies below `mlruns/` and is needed by no registered version and no running job.

    found = leftovers(Path.cwd(), unregistered=False)
    remove(Path.cwd(), found)

Only what tsp or MLflow have put there by themselves is looked at: a folder that somebody has named with `--output` is
theirs. Records of runs (their results, figures, metrics) stay.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsp.safety import known_files
from tsp.tracking.manifest import download_name
from tsp.tracking.pages import search_pages
from tsp.tracking.registry import CHECKPOINT_TAG
from tsp.tracking.store import mlruns_folder
from tsp.tracking.versions import model_names, registry, versions_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_ENDED = ("FAILED", "KILLED")
_HALF_MADE = (".register-", ".download-")
_UNTOUCHED_S = 24 * 3600
"""A folder under a temporary name, or of a job that has ended early, is nobody's when nothing in it is younger."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Something that can go."""

    what: str
    """`output`, `checkpoint`, `download`, `logged model` or `half made`."""
    why: str
    path: Path | None
    """Folder on this machine; None: a server has it."""
    logged_model: str | None = None
    """Its id, where MLflow keeps an entry of it."""

    @property
    def num_bytes(self) -> int:
        """That removing it frees: a file with other names stays under these."""
        if self.path is None:
            return 0
        sizes = (path.stat() for path in self.path.rglob("*") if path.is_file() and not path.is_symlink())
        return sum(stat.st_size for stat in sizes if stat.st_nlink == 1)

    def as_row(self) -> dict[str, Any]:
        """For a table or JSON."""
        where = str(self.path) if self.path else self.logged_model
        return {"what": self.what, "where": where, "bytes": self.num_bytes, "why": self.why}


def leftovers(root: Path, *, unregistered: bool) -> list[Leftover]:
    """Find what can go. Only reads.

    Args:
        root: working directory of the jobs.
        unregistered: also the checkpoints of finished jobs that were never registered; nothing else has these.

    Raises:
        ModelError: there is no store.
        TrackingError: it cannot be used.
    """
    mlruns = mlruns_folder(root)
    with registry(root) as client:
        versions = [version for name in model_names(client) for version in versions_of(client, name)]
        return [
            *_outputs(client, mlruns / "output", versions, unregistered),
            *_downloads(mlruns / "cache", {download_name(one, client.tracking_uri) for one in versions if one.aliases}),
            *_logged_models(client, versions),
            *_half_made(mlruns),
        ]


def remove(root: Path, found: list[Leftover]) -> None:
    """Remove them, each whole."""
    with registry(root) as client:
        for one in found:
            if one.logged_model is not None:
                client.delete_logged_model(one.logged_model)
            if one.path is not None and one.path.is_dir():
                # Away under its name first: what is interrupted is not taken for whole.
                going = one.path.with_name(f".removed-{one.path.name}")
                one.path.rename(going)
                shutil.rmtree(going)


def _outputs(
    client: "MlflowClient", folder: Path, versions: "list[ModelVersion]", unregistered: bool
) -> Iterator[Leftover]:
    registered = {version.run_id: version for version in versions}
    for output in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not output.is_dir():
            continue
        status = _status(client, output.name)
        if status in _ENDED:
            # `--resume` goes on from it.
            if _untouched(output):
                yield Leftover(what="output", why=f"its job ended {status} more than a day ago", path=output)
        elif status == "deleted":
            yield Leftover(what="output", why="its run is deleted", path=output)
        elif status == "FINISHED" and (output / "model").is_dir():
            version = registered.get(output.name)
            if version is not None and _has_all_of(client, version, output / "model"):
                why = f"it is version {version.version} of {version.name}, which has its own files"
                yield Leftover(what="checkpoint", why=why, path=output / "model")
            elif version is None and unregistered:
                yield Leftover(what="checkpoint", why="it was never registered", path=output / "model")


def _has_all_of(client: "MlflowClient", version: "ModelVersion", checkpoint: Path) -> bool:
    """Whether a version's own files are there: else the checkpoint is the last copy."""
    from mlflow.artifacts import list_artifacts

    location = client.get_model_version_download_uri(version.name, version.version)
    found = list_artifacts(artifact_uri=f"{location.rstrip('/')}/model", tracking_uri=client.tracking_uri)
    sizes = {file.path.rpartition("/")[2]: file.file_size for file in found}
    return all(sizes.get(file.name) == file.stat().st_size for file in known_files(checkpoint))


def _downloads(folder: Path, kept: set[str]) -> Iterator[Leftover]:
    for download in sorted(folder.iterdir()) if folder.is_dir() else ():
        known = download.name.startswith(".") or download.name in kept
        # A job may read it; whoever fetches it marks it.
        if download.is_dir() and not known and _untouched(download):
            yield Leftover(what="download", why="no alias leads to it, nobody has used it for a day", path=download)


def _logged_models(client: "MlflowClient", versions: "list[ModelVersion]") -> Iterator[Leftover]:
    """Of registrations that failed, and of versions that were deleted."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    needed = {version.model_id for version in versions} | {version.source.rpartition("/")[2] for version in versions}
    experiments = [one.experiment_id for one in search_pages(client.search_experiments)]
    for model in search_pages(client.search_logged_models, experiments) if experiments else ():
        if model.model_id in needed or CHECKPOINT_TAG not in model.tags:
            continue
        if _status(client, model.source_run_id) in ("RUNNING", "SCHEDULED", "unknown"):
            continue
        local = is_local_uri(model.artifact_location)
        path = Path(local_file_uri_to_path(model.artifact_location)) if local else None
        why = f"it is {str(model.status).rpartition('.')[2].lower()}, and no version is made of it"
        yield Leftover(what="logged model", why=why, path=path, logged_model=model.model_id)


def _half_made(mlruns: Path) -> Iterator[Leftover]:
    for pattern in ("output/.*", "output/*/.*", "cache/.*"):
        for path in sorted(mlruns.glob(pattern)):
            named = path.name.startswith((*_HALF_MADE, ".removed-")) or path.suffix == ".tmp"
            if path.is_dir() and named and _untouched(path):
                yield Leftover(what="half made", why="nobody has written to it for a day", path=path)


def _untouched(folder: Path) -> bool:
    try:
        newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return False  # It went just now: somebody is at work.
    return time.time() - newest > _UNTOUCHED_S


def _status(client: "MlflowClient", run_id: str) -> str:
    """Of a run; `deleted`, or `unknown` of one in another store, about which nothing is known."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return "unknown"
    return "deleted" if run.info.lifecycle_stage == "deleted" else str(run.info.status)

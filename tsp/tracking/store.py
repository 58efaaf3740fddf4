"""Where the tracking store is, and its safe first use.

    uri = resolve_uri(Path.cwd())
    open_store(uri, Path.cwd())
    experiment_id = ensure_experiment(MlflowClient(uri), "my-experiment")

`root` is always the working directory of the job, the folder that holds `mlruns/`. This module does not log anything;
it makes sure that what logs finds a store of the right schema, or one clear error.
"""

import logging
import os
import re
import sqlite3
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from tsp.errors import ConfigError, TrackingError
from tsp.masking import masked
from tsp.tracking.note import NOTE_TAG, note_for
from tsp.tracking.schema import age_of, sqlite_revision

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5
"""How long a tracking server may take to answer at the start of a job."""


def mlruns_folder(root: Path) -> Path:
    """Absolute path of the folder that holds the embedded store and the spool."""
    return Path(root).resolve() / "mlruns"


def spool_folder(root: Path) -> Path:
    """Absolute path of the folder of the spool files."""
    return mlruns_folder(root) / "spool"


def resolve_uri(folder: Path) -> str:
    """Tracking URI of a job that runs in `folder`.

    Args:
        folder: working directory of the job.

    Returns:
        `MLFLOW_TRACKING_URI` where it is set (a relative sqlite path is made absolute, so that no other working
        directory silently gets a second database), else the embedded sqlite file `mlruns/mlflow.db` below `folder`.

    Raises:
        ConfigError: the variable names something else, like a folder of files, which MLflow no longer writes.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return f"sqlite:///{mlruns_folder(folder) / 'mlflow.db'}"
    path = sqlite_path(uri)
    if path is not None:
        return f"sqlite:///{Path(folder).resolve() / path}"
    if not re.match(r"(https?|postgresql(\+\w+)?|mysql(\+\w+)?|mssql(\+\w+)?|databricks)://|databricks$", uri):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI must be sqlite:////ABSOLUTE/FILE.db or http(s)://HOST:PORT, got {masked(uri)!r}; "
            "unset it to use mlruns/mlflow.db"
        )
    return uri


def sqlite_path(uri: str) -> Path | None:
    """File behind a sqlite URI (relative if the URI is), None for any other store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///"))


def open_store(uri: str, root: Path, *, artifacts: str | None = None) -> None:
    """Make the store at `uri` ready for use, or fail fast. Safe in any number of processes at once.

    The schema of an embedded sqlite file is created exactly once, under a file lock: several processes that meet an
    empty file crash each other otherwise. A file whose schema is newer than the installed mlflow is left untouched.

    Args:
        uri: tracking URI, as from `resolve_uri`.
        root: working directory of the job; `mlruns/spool` is made below it.
        artifacts: where a new sqlite file keeps the files of MLflow's default experiment; None: beside itself.

    Raises:
        TrackingError: the folder cannot be written, the schema is unknown here, or the server does not answer.
    """
    # A pruning job is often run without a network, and reports nothing to third parties unless it is asked to.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # What a job registers holds no pickle, and neither it nor a server that it starts is to read any.
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    # With a server, mlflow announces each run on stdout, which belongs to `--json`.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        spool_folder(root).mkdir(parents=True, exist_ok=True)
        path = sqlite_path(uri)
        if path is None:
            probe_server(uri)
            # The sender has its own, longer patience; mlflow's would keep it in one call for minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            _open_sqlite(uri, path, artifacts or str(path.parent / "artifacts"))
    except OSError as error:
        raise TrackingError(f"the tracking store {shown(uri)} cannot be used: {error}") from error


def ensure_experiment(client: "MlflowClient", name: str) -> str:
    """Id of the experiment `name`, which is created if it is missing. Safe in any number of processes at once.

    With an embedded store the experiment gets an explicit, absolute artifact folder beside the database; a server
    decides itself. A new experiment gets a note that says how to read its runs.

    Raises:
        TrackingError: the experiment was deleted, or the store refuses the name.
    """
    from mlflow.exceptions import MlflowException

    path = sqlite_path(client.tracking_uri)
    location = None
    if path is not None:
        slug = re.sub(r"[^\w.-]+", "_", name).strip("._") or "experiment"
        location = str(path.parent / "artifacts" / slug)
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                # Only here, never later: from now on the note is the user's to change.
                return client.create_experiment(name, artifact_location=location, tags={NOTE_TAG: note_for(name)})
            except MlflowException:
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
    except MlflowException as error:
        raise TrackingError(f"experiment {name!r} cannot be opened at {shown(client.tracking_uri)}: {error}") from error
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} is deleted; choose another name with --experiment, or restore it with "
            f"`mlflow experiments restore -x {experiment.experiment_id}`"
        )
    return experiment.experiment_id


@contextmanager
def http_limits(*, timeout_s: int, retries: int) -> Iterator[None]:
    """Bound MLflow's HTTP calls inside the block, whatever the environment says.

    Args:
        timeout_s: seconds of silence after which a request fails.
        retries: repetitions of a failed request, inside mlflow; its default of 7 takes minutes.
    """
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}
    before = {key: os.environ.get(key) for key in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def probe_server(uri: str) -> None:
    """One small request to the server, which must be answered within a few seconds.

    Raises:
        TrackingError: it is not, or the server refuses us; the message says which, and what to do.
    """
    from mlflow import MlflowClient

    with http_limits(timeout_s=PROBE_TIMEOUT_S, retries=0):
        try:
            MlflowClient(uri).search_experiments(max_results=1)
        except Exception as error:
            raise TrackingError(f"the tracking server {shown(uri)} {_refusal(uri, error)}") from error


def _refusal(uri: str, error: Exception) -> str:
    """What a failed request means, and what to do."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import read_mlflow_creds

    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    user, host = read_mlflow_creds().username, urllib.parse.urlsplit(uri).hostname
    variables = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if status == 401 and user is None:
        return f"asks who you are (401); set {variables}"
    if status == 401:
        return f"does not accept user {user!r} with this password (401); correct {variables}"
    if status == 403 and "Host header" in str(error):
        return (
            f"does not answer to the name {host} (403); use another name of it in MLFLOW_TRACKING_URI, or start it "
            f"with --allowed-hosts {host}"
        )
    if status == 403:
        return f"does not let user {user!r} in (403); ask who runs it for the permission, or correct {variables}"
    reason = masked(str(error)).splitlines()[0][:300]
    return f"does not answer ({reason}); start it, correct MLFLOW_TRACKING_URI, or unset it to use the embedded store"


def shown(uri: str) -> str:
    """A store's URI as it may be printed: without `user:password@`, and without options, which may hold either."""
    if uri.startswith("sqlite:"):
        return uri
    scheme, separator, rest = uri.partition("://")
    return scheme + separator + rest.rpartition("@")[2].partition("?")[0]


def _open_sqlite(uri: str, path: Path, artifacts: str) -> None:
    """Check, create or migrate the schema of the sqlite file, and switch it to WAL. Called under the file lock."""
    import sqlalchemy
    from mlflow.store.db import utils
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    found, journal_mode = sqlite_revision(path)
    age = age_of(found)
    if age in ("older", "unknown"):
        _prepare_migration(path, str(found), age)
    if age != "current":
        noisy = logging.getLogger("mlflow.store.db.utils")
        level = noisy.level
        noisy.setLevel(logging.WARNING)
        try:
            if found is not None:
                # SqlAlchemyStore migrates only where a table is missing, and raises at other differences of the schema.
                utils._upgrade_db(sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool))
            SqlAlchemyStore(uri, artifacts)._dispose_engine()
        finally:
            noisy.setLevel(level)
    # In WAL mode writers and readers do not block each other; the file remembers it. It needs memory shared between the
    # processes, which a network file system does not offer.
    if journal_mode != "wal" and not _is_on_network(path):
        connection = sqlite3.connect(path, timeout=20)
        connection.execute("pragma journal_mode=wal")
        connection.close()


def _prepare_migration(path: Path, found: str, age: str) -> None:
    """Refuse a schema that the installed mlflow does not know; copy an older one, and say what happens to it."""
    import mlflow

    if age == "unknown":
        raise TrackingError(
            f"{path} was written by a newer mlflow than the installed {mlflow.__version__} (schema {found} is unknown "
            "here); upgrade mlflow in this environment, or work in another folder; the file was not touched"
        )
    copy = path.with_name(f"{path.name}.{found}")
    source, target = sqlite3.connect(path), sqlite3.connect(copy)
    source.backup(target)
    source.close()
    target.close()
    log.warning(
        "mlflow %s migrates %s now, from schema %s; an older mlflow can no longer open it, the copy %s it can",
        mlflow.__version__,
        path,
        found,
        copy.name,
    )


def _is_on_network(path: Path) -> bool:
    """Whether the file lies on a network file system, as far as the mount table tells."""
    import psutil

    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind.startswith(("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "fuse.sshfs"))


def find_run(client: "MlflowClient", run_id: str) -> "Run":
    """A run that is to go on.

    Raises:
        TrackingError: there is none of that id, or it is deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(f"run {run_id} is not in the store {shown(client.tracking_uri)}") from error
    if run.info.lifecycle_stage != "active":
        raise TrackingError(f"run {run_id} is deleted; `mlflow runs restore --run-id {run_id}` brings it back")
    return run

"""The tracking store as a person meets it: MLflow's web UI on it, and what state it is in.

    serve_ui(Path.cwd(), 5000)                      # until Ctrl-C
    ok, found, advice = store_condition(Path.cwd())

`mlflow ui` without arguments opens another database, and in a view that hides the model registry; this one opens the
store of the folder and prints links that lead to the right view. `store_condition` only reads.
"""

import os
import subprocess
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tsp.errors import TspError
from tsp.tracking.existing import existing_store
from tsp.tracking.schema import age_of, sqlite_revision
from tsp.tracking.store import open_store, probe_server, resolve_uri, shown, sqlite_path
from tsp.tracking.web import LOOPBACK, VIEW, check_port, running, until_it_ends


def serve_ui(root: Path, port: int, *, writable: bool = False) -> int:
    """Show the store of a folder in MLflow's web UI, on this machine only, until Ctrl-C.

    With a tracking server in `MLFLOW_TRACKING_URI` there is nothing to start: the links to it are printed.

    Args:
        root: working directory of the jobs, the folder that holds `mlruns/`.
        port: to listen on.
        writable: whether what is changed in the UI is changed in the store; else the database is opened read-only.

    Returns:
        0 after Ctrl-C; the exit code of a server that ended by itself.

    Raises:
        ConfigError: no store yet, or no such port.
        TrackingError: a store this mlflow cannot read, a port in use, no start, or a tracking server that
            does not answer.
    """
    uri = existing_store(root)
    path = sqlite_path(uri)
    if path is None:
        print_links(links(shown(uri), uri))
        return 0
    check_port(LOOPBACK, port)
    open_store(uri, root)
    with site(path, port, writable=writable) as server:
        print_links(links(f"http://{LOOPBACK}:{port}", uri))
        return until_it_ends(server)


@contextmanager
def site(path: Path, port: int, *, writable: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's web UI on an embedded store, which answers inside the block.

    Args:
        path: the sqlite file, of the installed mlflow's schema.
        port: to listen on, on this machine only.
        writable: as of `serve_ui`.
    """
    uri = f"sqlite:///{path}" if writable else f"sqlite:///file:{urllib.parse.quote(str(path))}?mode=ro&uri=true"
    # Clients use the sqlite file itself: experiments made through this server must not get served artifacts.
    command = [
        "server",
        "--no-serve-artifacts",
        "--default-artifact-root",
        str(path.parent / "artifacts"),
        "--workers",
        "1",
    ]
    # mlflow 3.17 makes the folder that a sqlite file is to lie in, and takes `file:` for one.
    with (
        tempfile.TemporaryDirectory() as folder,
        running(command, LOOPBACK, port, environment={"MLFLOW_BACKEND_STORE_URI": uri}, folder=Path(folder)) as server,
    ):
        yield server


def links(base_url: str, uri: str) -> dict[str, str]:
    """Where to look: the experiments, the newest run with its charts and neighbours (where there is one), the registry.

    Args:
        base_url: address of the web UI.
        uri: tracking URI of the store behind it.

    Raises:
        TrackingError: a tracking server that does not answer, or not to us.
    """
    from mlflow import MlflowClient

    if sqlite_path(uri) is None:
        probe_server(uri)
    client, base = MlflowClient(uri), f"{base_url.rstrip('/')}/#"
    found = {"experiments": f"{base}/experiments{VIEW}"}
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1)
    if runs:
        info = runs[0].info
        beside = f"{base}/experiments/{info.experiment_id}/runs"
        found["newest run"] = f"{beside}/{info.run_id}{VIEW}"
        found["its charts"] = f"{beside}/{info.run_id}/model-metrics{VIEW}"
        found["beside it"] = f"{beside}{VIEW}"
    return found | {"models": f"{base}/models{VIEW}"}


def print_links(named: Mapping[str, str]) -> None:
    """One line each."""
    for name, link in named.items():
        print(f"{name:12} {link}", flush=True)


def store_condition(root: Path) -> tuple[bool, str, str]:
    """Whether a job in this folder could log; nothing is created or changed.

    Args:
        root: working directory of the job.

    Returns:
        Whether it could, what there is, and what to do if it could not.
    """
    try:
        uri = resolve_uri(root)
        path = sqlite_path(uri)
        if path is None:
            probe_server(uri)
            return True, f"{shown(uri)} answers", ""
        if not path.exists() or path.stat().st_size == 0:
            return _new_store_condition(path)
        revision, _ = sqlite_revision(path)
    except (TspError, OSError) as error:
        return False, "cannot be used", str(error)
    return _revision_condition(path, revision)


def _new_store_condition(path: Path) -> tuple[bool, str, str]:
    parent = next(folder for folder in path.parents if folder.exists())
    if os.access(parent, os.W_OK):
        return True, f"{path}, to be made by the first job", ""
    return False, f"{parent} is read-only", "work in a folder you may write, or set MLFLOW_TRACKING_URI"


def _revision_condition(path: Path, revision: str | None) -> tuple[bool, str, str]:
    import mlflow

    age = age_of(revision)
    if age == "current":
        return True, f"{path}, schema {revision}", ""
    if age == "new":
        return True, f"{path}, without a schema; the next job makes it", ""
    if age == "older":
        return True, f"{path}, schema {revision} of an older mlflow; the next job keeps a copy and migrates it", ""
    found = f"{path}, schema {revision} unknown to mlflow {mlflow.__version__}"
    return False, found, "upgrade mlflow in this environment, or work in another folder"

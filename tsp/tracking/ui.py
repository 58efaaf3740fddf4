"""The tracking store as a person meets it: MLflow's web UI on it, and what state it is in.

    serve_ui(Path.cwd(), 5000)                      # until Ctrl-C
    ok, found, advice = store_condition(Path.cwd())

`mlflow ui` without arguments opens another database, and in a view that hides the model registry; this one opens the
store of the folder and prints links that lead to the right view. `store_condition` only reads.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsp.errors import TrackingError
from tsp.tracking.store import _probe_server, _read_revision, open_store, resolve_uri, sqlite_path

VIEW = "?workflowType=machine_learning"
"""MLflow 3 opens in its GenAI view, where charts of training runs and the model registry are hidden."""

START_S = 120.0
"""How long the server may take to answer; a few seconds on an idle machine."""


def serve_ui(root: Path, port: int) -> int:
    """Show the store of a folder in MLflow's web UI, on this machine only, until Ctrl-C.

    With a tracking server in `MLFLOW_TRACKING_URI` there is nothing to start: the links to it are printed.

    Args:
        root: working directory of the jobs, the folder that holds `mlruns/`.
        port: to listen on.

    Returns:
        0 after Ctrl-C; the exit code of a server that ended by itself.

    Raises:
        TrackingError: no store yet, a store this mlflow cannot read, a port in use, or no start.
    """
    uri = resolve_uri(root)
    path = sqlite_path(uri)
    if path is None:
        _print_links(uri, uri)
        return 0
    if not path.exists() or path.stat().st_size == 0:
        raise TrackingError(f"there is no tracking store {path} yet; prune a model first, or go to the folder of one")
    _check_port(port)
    open_store(uri, root)
    with _server(uri, path, port) as server:
        _wait_until_it_answers(server, port)
        _print_links(f"http://127.0.0.1:{port}", uri)
        print("Ctrl-C ends it.", flush=True)
        try:
            return server.wait()
        except KeyboardInterrupt as interrupt:
            # SIGTERM arrives as an heir of KeyboardInterrupt and keeps its own exit code.
            if type(interrupt) is not KeyboardInterrupt:
                raise
            return 0


def links(base_url: str, uri: str) -> dict[str, str]:
    """Where to look: the experiments, the newest run's charts (where there is a run), the model registry.

    Args:
        base_url: address of the web UI.
        uri: tracking URI of the store behind it.
    """
    from mlflow import MlflowClient

    client, base = MlflowClient(uri), f"{base_url.rstrip('/')}/#"
    found = {"experiments": f"{base}/experiments{VIEW}"}
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1)
    if runs:
        info = runs[0].info
        run = f"{base}/experiments/{info.experiment_id}/runs/{info.run_id}"
        found["newest run"] = f"{run}{VIEW}"
        found["its charts"] = f"{run}/model-metrics{VIEW}"
    return found | {"models": f"{base}/models{VIEW}"}


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
            _probe_server(uri)
            return True, f"{_shown(uri)} answers", ""
        if not path.exists() or path.stat().st_size == 0:
            return _new_store_condition(path)
        revision, _ = _read_revision(path)
    except (TrackingError, OSError) as error:
        return False, "cannot be used", str(error)
    return _revision_condition(path, revision)


def _new_store_condition(path: Path) -> tuple[bool, str, str]:
    parent = next(folder for folder in path.parents if folder.exists())
    if os.access(parent, os.W_OK):
        return True, f"{path}, to be made by the first job", ""
    return False, f"{parent} is read-only", "work in a folder you may write, or set MLFLOW_TRACKING_URI"


def _revision_condition(path: Path, revision: str | None) -> tuple[bool, str, str]:
    import mlflow
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision

    known = {script.revision for script in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()}
    if revision == _get_latest_schema_revision():
        return True, f"{path}, schema {revision}", ""
    if revision is None:
        return True, f"{path}, without a schema; the next job makes it", ""
    if revision in known:
        return True, f"{path}, schema {revision} of an older mlflow; the next job keeps a copy and migrates it", ""
    found = f"{path}, schema {revision} unknown to mlflow {mlflow.__version__}"
    return False, found, "upgrade mlflow in this environment, or work in another folder"


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise TrackingError(f"--port must be in [1, 65535], got {port}")
    with socket.socket() as probe:
        # As servers do: a port that a server has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise TrackingError(f"port {port} cannot be used ({error.strerror}); give another with --port") from None


@contextmanager
def _server(uri: str, path: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`mlflow server` in its own process group, stopped with all its workers at the end of the block."""
    # Clients use the sqlite file itself: experiments made through this server must not get served artifacts.
    options = ["--backend-store-uri", uri, "--no-serve-artifacts", "--default-artifact-root"]
    options += [str(path.parent / "artifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options],
        # mlflow finds uvicorn on PATH; and its seven processes for GenAI jobs take 1.6 GB.
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
    )
    try:
        yield server
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise TrackingError("mlflow's web server did not start; what it says stands above")


def _print_links(base_url: str, uri: str) -> None:
    for name, link in links(base_url, uri).items():
        print(f"{name:12} {link}", flush=True)


def _shown(uri: str) -> str:
    """The URI without `user:password@`."""
    scheme, separator, rest = uri.partition("://")
    return scheme + separator + rest.rpartition("@")[2]

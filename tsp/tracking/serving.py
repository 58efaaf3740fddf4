"""`tsp serve`: MLflow's own scoring server on a registered version, on this machine.

    serve_model("models:/demo-pruned@champion", Path.cwd(), host="127.0.0.1", port=5001)    # until Ctrl-C

It runs in this environment; nothing is installed, and pickles are not read. An alias is looked up once, at the start:
what is served does not change under its users.
"""

import json
import sys
import tempfile
from pathlib import Path

from tsp.errors import ModelError
from tsp.tracking.fetch import split_uri
from tsp.tracking.manifest import file_faults
from tsp.tracking.store import resolve_uri
from tsp.tracking.versions import find_version, registry
from tsp.tracking.web import check_port, is_loopback, running, until_it_ends, url_of


def serve_model(uri: str, root: Path, *, host: str, port: int) -> int:
    """Answer `POST /invocations` with what a version writes, until Ctrl-C.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        root: working directory of the jobs.
        host: to listen on.
        port: to listen on.

    Returns:
        0 after Ctrl-C; the exit code of a server that ended by itself.

    Raises:
        ModelError: no such version, or its files are not what was registered.
        TrackingError: the store cannot be used, a port in use, no start.
    """
    name, wanted = split_uri(uri)
    with registry(root) as client:
        version = find_version(client, name, wanted)
        faults = file_faults(client, version)
    if faults:
        raise ModelError(
            f"version {version.version} of {name} is not served, since it is not as it was registered: "
            f"{'; '.join(faults[:3])}"
        )
    check_port(host, port)
    if not is_loopback(host):
        print("warning: whoever reaches this server may use the model; it asks for no password", file=sys.stderr)
    pinned = f"models:/{name}/{version.version}"
    store = resolve_uri(root)
    environment = {
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_REGISTRY_URI": store,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    command = ["models", "serve", "--model-uri", pinned, "--env-manager", "local"]
    with (
        tempfile.TemporaryDirectory(prefix="tsp-") as folder,
        running(command, host, port, environment=environment, folder=Path(folder)) as server,
    ):
        body = json.dumps({"inputs": ["Once upon a time"], "params": {"max_new_tokens": 20}})
        print(f"{pinned} answers at {url_of(host, port)}/invocations")
        print(f"try         curl -H 'Content-Type: application/json' -d '{body}' {url_of(host, port)}/invocations")
        return until_it_ends(server)

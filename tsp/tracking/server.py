"""A team's tracking server: `mlflow server` with defaults that can be left as they are.

    serve(Path.cwd(), host="0.0.0.0", port=5000)    # until Ctrl-C

What it keeps is in `mlruns/server/`, which only its owner may enter: the database where no other is named, the files of
runs and models, the users. Clients send and fetch files through the server and need no way into that folder. Passwords
go to `mlflow server` by its environment, so that no process list and no output has one. Jobs on the embedded store know
nothing of it.
"""

import ipaddress
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from tsp.errors import ConfigError, TrackingError
from tsp.tracking.schema import age_of
from tsp.tracking.store import mlruns_folder, open_store, shown, sqlite_path
from tsp.tracking.ui import print_links
from tsp.tracking.users import (
    ADMIN,
    AUTH_OPTIONS,
    Admin,
    admin_of,
    environment_of,
    require_auth,
    warn_of_another_password,
)
from tsp.tracking.web import LOOPBACK, VIEW, check_port, is_loopback, running, until_it_ends, url_of

STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
CONNECT_S = 10
"""How long a database may take to answer."""

# Patterns as mlflow reads them: of a name without `*` each character counts, that of a port too.
_LOCAL = ("localhost", LOOPBACK, "::1")


def serve(
    root: Path,
    *,
    host: str = LOOPBACK,
    port: int = 5000,
    store: str | None = None,
    artifacts: str | None = None,
    allowed_hosts: Iterable[str] = (),
    auth: bool | None = None,
    admin_password_file: Path | None = None,
) -> int:
    """Run a tracking server until Ctrl-C.

    Args:
        root: working directory; what the server keeps is in `mlruns/server/` below it.
        host: address to listen on.
        port: to listen on.
        store: as of `store_uri`.
        artifacts: folder or URI below which all files are kept; None: a folder of the server.
        allowed_hosts: names by which clients call the server; none: those that this machine knows of itself. It always
            answers to `localhost`.
        auth: whether users must say who they are; None: unless only this machine can reach it and nobody has set a
            password.
        admin_password_file: holds the password of the user `admin`; None: one is made up at the first start.

    Returns:
        0 after Ctrl-C; the exit code of a server that ended by itself.

    Raises:
        ConfigError: an option that cannot be used as it is.
        TrackingError: a database that cannot be reached or has another mlflow's schema, a port in use, no start.
    """
    uri, folder = store_uri(store, root), mlruns_folder(root) / "server"
    if admin_password_file and auth is False:
        raise ConfigError("--admin-password-file is for a server with users, --no-auth for one without; give one")
    auth = bool(admin_password_file) or not is_loopback(host) if auth is None else auth
    if auth:
        require_auth()
    elif not is_loopback(host):
        print("warning: without users, whoever reaches this server may read and delete everything", file=sys.stderr)
    check_port(host, port)
    if auth and admin_password_file:
        admin_of(admin_password_file, folder)  # It is refused before anything is made.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    admin = admin_of(admin_password_file, folder) if auth else None
    _open_database(uri, root)
    kept = (
        artifacts
        if artifacts and "://" in artifacts
        else str(Path(root).resolve() / (artifacts or folder / "artifacts"))
    )
    names = [*_LOCAL, *(allowed_hosts or own_names(host))]
    command = ["server", "--serve-artifacts", "--artifacts-destination", kept]
    command += ["--allowed-hosts", ",".join(host_patterns(names))]
    environment = {STORE_VARIABLE: uri}
    if admin:
        command += AUTH_OPTIONS
        environment |= environment_of(admin, folder)
    with running(command, host, port, environment=environment, folder=folder) as server:
        if admin:
            warn_of_another_password(admin, url_of(host, port))
        print_links(_summary(host, port, admin) | {"store": shown(uri), "files": kept, "called": ", ".join(names)})
        return until_it_ends(server)


def store_uri(given: str | None, root: Path) -> str:
    """The database of a server.

    Args:
        given: `sqlite:///FILE.db` or `postgresql://USER@HOST/DATABASE`, without a password; None: the environment's
            `MLFLOW_BACKEND_STORE_URI`, which may have one, else a sqlite file in the server's folder.
        root: working directory, from which a relative file is meant.

    Raises:
        ConfigError: another kind of store, or a password where all users of the machine can read it.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    uri = given or os.environ.get(STORE_VARIABLE, "").strip() or f"sqlite:///{mlruns_folder(root)}/server/mlflow.db"
    path = sqlite_path(uri)
    if path is not None:
        return f"sqlite:///{Path(root).resolve() / path}"
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.get_backend_name() != "postgresql":
        # The rest may hold a password.
        kind = uri.partition(":")[0]
        where = "--store" if given else STORE_VARIABLE
        raise ConfigError(f"{where} must be sqlite:///FILE.db or postgresql://USER@HOST/DATABASE, got {kind}:...")
    if given and (url.password or "password" in url.query):
        raise ConfigError(
            "--store must not hold a password, which all users of this machine can read in the process list; put the "
            f"URI into {STORE_VARIABLE}, or the password into ~/.pgpass"
        )
    # Which driver this stands for depends on sqlalchemy's version.
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg2")
    return url.render_as_string(hide_password=False)


def own_names(host: str) -> list[str]:
    """Names by which others may call a server that listens on `host`; none where nobody else can reach it."""
    import psutil

    if is_loopback(host):
        return []
    families = (socket.AF_INET, socket.AF_INET6)
    addresses = [address for network in psutil.net_if_addrs().values() for address in network]
    own = [address.address.partition("%")[0] for address in addresses if address.family in families]
    name = socket.gethostname()
    names = dict.fromkeys([name, name.partition(".")[0], *own])
    return [name for name in names if not is_loopback(name)]


def host_patterns(names: Iterable[str]) -> list[str]:
    """Patterns of the `Host` headers that a server shall answer to; a name stands for itself with any port.

    Args:
        names: also with a port, or with `*`; then they are left as they are.
    """
    patterns: list[str] = []
    for name in names:
        try:
            bare = f"[{name}]" if ipaddress.ip_address(name).version == 6 else name
        except ValueError:
            bare = name
        # In a pattern, a bracket begins a set of characters.
        plain = bare != name or not {":", "*"} & set(name)
        patterns += [bare, f"{bare.replace('[', '[[]')}:*"] if plain else [bare]
    return patterns


def _open_database(uri: str, root: Path) -> None:
    """Make the database ready, or fail before anything is started.

    A sqlite file is made or migrated here, as that of a job is. mlflow makes the tables of an empty PostgreSQL
    database, and whoever runs it decides when it is migrated.
    """
    if sqlite_path(uri) is not None:
        open_store(uri, root, artifacts="mlflow-artifacts:/")
        return
    import mlflow
    import sqlalchemy
    from mlflow.store.db.utils import _get_schema_version

    try:
        connecting = {"connect_timeout": CONNECT_S}
        revision = _get_schema_version(
            sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool, connect_args=connecting)
        )
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing, to reach {shown(uri)}: pip install 'tsp[server]'") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise TrackingError(
            f"the database {shown(uri)} cannot be used ({reason}); start it, or correct --store or {STORE_VARIABLE}"
        ) from None
    age = age_of(revision)
    if age == "older":
        raise TrackingError(
            f"the database {shown(uri)} has schema {revision}, of an older mlflow than the {mlflow.__version__} here: "
            "end the servers on it, make a copy, and run `mlflow db upgrade URI` here (the password in PGPASSWORD)"
        )
    if age == "unknown":
        raise TrackingError(
            f"the database {shown(uri)} was written by a newer mlflow than the {mlflow.__version__} here (schema "
            f"{revision} is unknown to it): upgrade mlflow in the server's environment"
        )


def _summary(host: str, port: int, admin: Admin | None) -> dict[str, str]:
    """What users are to know."""
    base = url_of(host, port) if is_loopback(host) else url_of(socket.gethostname(), port)
    variables = {"MLFLOW_TRACKING_URI": base}
    told = {"web UI": f"{base}/#/experiments{VIEW}", "models": f"{base}/#/models{VIEW}"}
    if admin:
        told["users"] = f"{ADMIN}, with the password in {admin.file}; {ADMIN} makes others at {base}/signup"
        variables |= {"MLFLOW_TRACKING_USERNAME": "...", "MLFLOW_TRACKING_PASSWORD": "..."}
    return told | {"clients set": " ".join(f"{name}={value}" for name, value in variables.items())}

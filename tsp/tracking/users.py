"""Who may use a tracking server of ours: mlflow's basic auth with a user `admin`, who makes the others.

    admin = admin_of(None, folder)
    running([*command, *AUTH_OPTIONS], ..., environment=environment_of(admin, folder))
    warn_of_another_password(admin, url)

The password goes to the server by its environment, which other users do not see. It is kept in `admin-password`, where
it was made up here, and is never printed.
"""

import base64
import importlib.util
import os
import secrets
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from tsp.errors import ConfigError
from tsp.tracking.web import DIRECT

ADMIN = "admin"
AUTH_OPTIONS = ("--app-name", "basic-auth")
MIN_PASSWORD = 12
"""Characters; mlflow takes no shorter one."""

CONFIG_VARIABLE = "MLFLOW_AUTH_CONFIG_PATH"

# MANAGE: whoever moves an alias needs the right to delete the model, for MLflow, and else only its maker has that.
# The cache: a password is hashed at each request, which takes longer than most of what is asked for.
_CONFIG = """\
[mlflow]
default_permission = MANAGE
database_uri = sqlite:///{database}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


@dataclass(frozen=True, kw_only=True)
class Admin:
    """The first user's password, and the file that holds it."""

    file: Path
    password: str = field(repr=False)


def require_auth() -> None:
    """Whether mlflow can tell users apart here.

    Raises:
        ConfigError: a package is missing.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        raise ConfigError("users need Flask-WTF: pip install 'tsp[server]', or do without them: --no-auth")


def admin_of(given: Path | None, folder: Path) -> Admin:
    """The admin's password: from the file that is given, else from one in the server's folder, made at the first start.

    Raises:
        ConfigError: the file cannot be read, or the password is too short.
    """
    file = given or folder / "admin-password"
    if given is None and not file.exists():
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as made:
            made.write(f"{secrets.token_urlsafe(24)}\n")
    try:
        password = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the admin's password cannot be read from {file}: {error}") from None
    if len(password) < MIN_PASSWORD:
        raise ConfigError(
            f"the admin's password must have at least {MIN_PASSWORD} characters, got {len(password)} in {file}"
        )
    return Admin(file=file, password=password)


def environment_of(admin: Admin, folder: Path) -> dict[str, str]:
    """What `mlflow server` is told of users; they are kept in the server's folder.

    A configuration named by `MLFLOW_AUTH_CONFIG_PATH` is used as it is.
    """
    config = os.environ.get(CONFIG_VARIABLE)
    if config is None:
        path = folder / "auth.ini"
        path.write_text(_CONFIG.format(database=folder / "auth.db").replace("%", "%%"), encoding="utf-8")
    return {
        CONFIG_VARIABLE: str(Path(config).resolve() if config else path),
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
        "MLFLOW_AUTH_ADMIN_PASSWORD": admin.password,
        # Of the form by which the admin makes users; all workers have the same.
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY") or secrets.token_hex(32),
    }


def warn_of_another_password(admin: Admin, url: str) -> None:
    """Say so if the file's password is not the admin's: mlflow takes it at the first start only."""
    token = base64.b64encode(f"{ADMIN}:{admin.password}".encode()).decode()
    request = urllib.request.Request(
        f"{url}/api/2.0/mlflow/users/current", headers={"Authorization": f"Basic {token}", "Host": "localhost"}
    )
    try:
        DIRECT.open(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code == 401:
            print(
                f"warning: {admin.file} does not hold the password of {ADMIN}, which was set at the first start or "
                "changed since, and stays as it is",
                file=sys.stderr,
            )
    except OSError:
        # Whether the server answers is seen by others.
        pass

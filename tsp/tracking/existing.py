"""A store that is read: looking at one must not make it."""

from pathlib import Path

from tsp.errors import ConfigError
from tsp.tracking.store import resolve_uri, sqlite_path


def existing_store(root: Path) -> str:
    """The tracking URI of a folder's store.

    Args:
        root: working directory of the jobs.

    Raises:
        ConfigError: it is a file, and not there.
    """
    uri = resolve_uri(root)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise ConfigError(
            f"there is no tracking store {path}; run this where the jobs ran, or set MLFLOW_TRACKING_URI to their store"
        )
    return uri

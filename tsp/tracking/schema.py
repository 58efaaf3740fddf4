"""Which schema a tracking database has, and whether the installed mlflow can use it. Only reads.

revision, journal_mode = sqlite_revision(path)
if age_of(revision) == "unknown":
    raise TrackingError(...)
"""

import sqlite3
import urllib.parse
from pathlib import Path
from typing import Literal

from tsp.errors import TrackingError


def sqlite_revision(path: Path) -> tuple[str | None, str]:
    """Schema revision of a sqlite file (None: no schema yet) and its journal mode.

    Raises:
        TrackingError: the file is no database.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None, ""
    connection = sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode=ro", uri=True, timeout=20)
    try:
        (mode,) = connection.execute("pragma journal_mode").fetchone()
        (tables,) = connection.execute("select count(*) from sqlite_master where name = 'alembic_version'").fetchone()
        row = connection.execute("select version_num from alembic_version").fetchone() if tables else None
    except sqlite3.DatabaseError as error:
        raise TrackingError(
            f"{path} is not a usable tracking database ({error}); move it away or restore it"
        ) from error
    finally:
        connection.close()
    return (row[0] if row else None), mode


def age_of(revision: str | None) -> Literal["new", "current", "older", "unknown"]:
    """How a schema stands to the installed mlflow's: not made yet, its own, of an older one, or of a newer one."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision

    if revision is None:
        return "new"
    if revision == _get_latest_schema_revision():
        return "current"
    known = {script.revision for script in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()}
    return "older" if revision in known else "unknown"

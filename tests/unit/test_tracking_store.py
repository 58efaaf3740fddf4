"""The store: first use by many processes, schemas of other versions, servers that are away. Nothing is mocked."""

import logging
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tsp.errors import ConfigError, TrackingError
from tsp.tracking.store import ensure_experiment, open_store, resolve_uri

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    open_store(f"sqlite:///{folder}/mlruns/mlflow.db", folder)
    return folder


def test_uri_is_absolute_wherever_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(Path(".")) == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert resolve_uri(Path(".")) == f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_uri(Path(".")) == "http://host:5000"


@pytest.mark.parametrize("uri", ["./mlruns", "/data/mlruns"])
def test_plain_folder_is_refused_with_a_hint(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match="sqlite:////ABSOLUTE"):
        resolve_uri(tmp_path)


def test_several_processes_may_open_an_empty_store_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tsp.tracking.store import *; from mlflow import MlflowClient\n"
        "root = Path(sys.argv[1]); uri = resolve_uri(root); sys.stdin.readline(); open_store(uri, root)\n"
        "print(ensure_experiment(MlflowClient(uri), 'race'))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, **pipes) for _ in range(3)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, results
    assert len({out for out, _ in results}) == 1
    connection = sqlite3.connect(tmp_path / "mlruns" / "mlflow.db")
    assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
    connection.close()


def test_experiment_has_an_absolute_artifact_folder_beside_the_database(root):
    from mlflow import MlflowClient

    client = MlflowClient(resolve_uri(root))
    first = ensure_experiment(client, "my team/prune: 1")
    assert ensure_experiment(client, "my team/prune: 1") == first
    assert client.get_experiment(first).artifact_location == f"{root}/mlruns/artifacts/my_team_prune_1"
    client.delete_experiment(first)
    with pytest.raises(TrackingError, match="is deleted"):
        ensure_experiment(client, "my team/prune: 1")


def _copy_with_revision(root: Path, target: Path, revision: str) -> Path:
    target.mkdir(parents=True)
    source, copy = sqlite3.connect(root / "mlruns" / "mlflow.db"), sqlite3.connect(target / "mlflow.db")
    source.backup(copy)
    copy.execute("update alembic_version set version_num = ?", (revision,))
    copy.commit()
    source.close()
    copy.close()
    return target / "mlflow.db"


def test_schema_of_a_newer_mlflow_is_left_untouched(root, tmp_path):
    path = _copy_with_revision(root, tmp_path / "mlruns", "feedc0ffee00")
    before = path.read_bytes()
    with pytest.raises(TrackingError, match=r"newer mlflow than the installed .* upgrade mlflow"):
        open_store(resolve_uri(tmp_path), tmp_path)
    assert path.read_bytes() == before


def test_schema_of_an_older_mlflow_is_migrated_with_a_word_and_a_copy(tmp_path, caplog):
    import sqlalchemy
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import InitialBase, _get_alembic_config

    uri = resolve_uri(tmp_path)
    (tmp_path / "mlruns").mkdir()
    scripts = ScriptDirectory.from_config(_get_alembic_config(""))
    older = scripts.get_revision(scripts.get_heads()[0]).down_revision
    engine = sqlalchemy.create_engine(uri)
    InitialBase.metadata.create_all(engine)
    config = _get_alembic_config(uri)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, older)
    engine.dispose()

    with caplog.at_level(logging.WARNING):
        open_store(uri, tmp_path)
    assert f"from schema {older}" in caplog.text
    for name, revision in (("mlflow.db", scripts.get_heads()[0]), (f"mlflow.db.{older}", older)):
        connection = sqlite3.connect(tmp_path / "mlruns" / name)
        assert connection.execute("select version_num from alembic_version").fetchone() == (revision,)
        connection.close()


def test_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_text("this is not a database, but long enough to be taken for one" * 20)
    with pytest.raises(TrackingError, match="not a usable tracking database"):
        open_store(resolve_uri(tmp_path), tmp_path)


def test_server_that_is_away_fails_fast_and_hides_the_password(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer") as caught:
        open_store(f"http://user:hunter2@127.0.0.1:{port}", tmp_path)
    assert time.monotonic() - start < 10
    assert "hunter2" not in str(caught.value).partition("(")[0]

"""`tsp server`: real servers with users, on sqlite and on PostgreSQL, with real clients and two users who race."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.models import free_port, model_folder, tiny_model
from tests.postgres import DATABASE_PASSWORD, Postgres, postgres_program
from tsp.errors import TrackingError
from tsp.tracking import run as run_module
from tsp.tracking.fetch import checkpoint_path
from tsp.tracking.promotion import decisions, holder
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.run import start_run
from tsp.tracking.server import serve
from tsp.tracking.spool import sync
from tsp.tracking.store import open_store, spool_folder
from tsp.tracking.ui import links, store_condition
from tsp.tracking.users import Admin, warn_of_another_password

REPOSITORY = Path(__file__).resolve().parents[2]
USERS = {"alice": "alice's password", "bob": "bob's password"}

RACER = """
import sys, time
from pathlib import Path
from mlflow import MlflowClient
from tsp.tracking.lock import locked
from tsp.tracking.promotion import Decision, holder, move, recorded
from tsp.tracking.store import open_store, resolve_uri
uri, mine, log = resolve_uri(Path.cwd()), sys.argv[1], Path("race.log")
open_store(uri, Path.cwd())
client = MlflowClient(uri)
for _ in range(3):
    with locked(client, "raced"):
        with log.open("a") as file:
            file.write("in\\n")
        before = holder(client, "raced", "champion")
        decision = Decision(
            kind="promotion", model="raced", version=mine, alias="champion", previous=before, behind=before
        )
        with recorded(client, decision):
            move(client, decision)
        with log.open("a") as file:
            file.write("out\\n")
"""


class Server:
    """`tsp server` in a folder, with all it prints."""

    def __init__(self, folder: Path, *options: str, workers: int, **environment: str) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.errors = folder / "stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tsp", "server", "--port", str(self.port), *options],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "MLFLOW_WORKERS": str(workers), **environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.printed = ""
        while "Ctrl-C" not in self.printed:
            line = self.process.stdout.readline()
            assert line, self.errors.read_text()
            self.printed += line

    @property
    def password(self) -> str:
        return (self.folder / "mlruns/server/admin-password").read_text().strip()

    def family(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def end(self, number: int, code: int) -> None:
        """It dies with all its workers, and with the exit code of the signal."""
        family = self.family()
        assert len(family) > 1
        self.process.send_signal(number)
        assert self.process.wait(timeout=60) == code
        # One whose parent went first may wait a while for the machine to collect it.
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0


@pytest.fixture(scope="module")
def postgres():
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install 'tsp[server]'")
    if postgres_program("postgres") is None or postgres_program("initdb") is None:
        pytest.skip("PostgreSQL is not installed (Debian, Ubuntu: apt-get install postgresql)")
    database = Postgres()
    yield database
    database.stop()


def with_users(server: Server) -> Server:
    from mlflow.server import get_app_client

    with pytest.MonkeyPatch.context() as environment:
        sign_in(environment, server, "admin", server.password)
        admin = get_app_client("basic-auth", tracking_uri=server.uri)
        for name, password in USERS.items():
            admin.create_user(name, password)
    return server


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory):
    pytest.importorskip("flask_wtf", reason="Flask-WTF is not installed: pip install 'tsp[server]'")
    server = with_users(Server(tmp_path_factory.mktemp("sqlite"), "--auth", workers=1))
    yield server
    server.end(signal.SIGTERM, 143)


@pytest.fixture(scope="module")
def on_postgres(postgres, tmp_path_factory):
    pytest.importorskip("flask_wtf", reason="Flask-WTF is not installed: pip install 'tsp[server]'")
    postgres.execute("create database served")
    uri = {"MLFLOW_BACKEND_STORE_URI": postgres.uri("served")}
    server = with_users(Server(tmp_path_factory.mktemp("postgres"), "--auth", workers=2, **uri))
    yield server
    server.end(signal.SIGINT, 0)


@pytest.fixture(params=["sqlite", "postgres"])
def server(request):
    return request.getfixturevalue(f"on_{request.param}")


def sign_in(environment: pytest.MonkeyPatch, server: Server, name: str, password: str) -> None:
    environment.setenv("MLFLOW_TRACKING_URI", server.uri)
    environment.setenv("MLFLOW_TRACKING_USERNAME", name)
    environment.setenv("MLFLOW_TRACKING_PASSWORD", password)
    # `open_store` sets these where the user has not; the next test shall not find them.
    environment.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    environment.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


@pytest.fixture
def as_alice(server, monkeypatch):
    sign_in(monkeypatch, server, "alice", USERS["alice"])


def status(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/version",
        "/signup",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "/api/2.0/mlflow/registered-models/search",
        "/api/2.0/mlflow-artifacts/artifacts",
        "/get-artifact?path=config.yaml&run_uuid=0",
    ],
)
def test_nothing_is_shown_to_strangers(on_sqlite, path):
    code, text = status(f"{on_sqlite.uri}{path}")
    assert (code, "not authenticated" in text) == (401, True)


def test_other_names_of_the_host_are_refused(on_sqlite):
    path = f"{on_sqlite.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    code, text = status(path, Host="attacker.example")
    assert (code, "Invalid Host header" in text) == (403, True)
    assert status(path, Host=f"localhost:{on_sqlite.port}")[0] == 401


def test_passwords_are_in_no_process_list_and_no_output(server):
    # Of the database's a piece that looks the same in a URI.
    known = [server.password, DATABASE_PASSWORD[:6], *USERS.values()]
    family = server.family()
    assert len(family) >= 3  # Ours, mlflow's, and what serves.
    seen = [" ".join(process.cmdline()) for process in family]
    assert all(str(server.port) in words for words in seen[:3])
    seen += [server.printed, server.errors.read_text()]
    # That it would be found: here it has to be, as this is how the server knows it.
    assert any(server.password in process.environ().values() for process in family)
    assert not [(password, text) for password in known for text in seen if password in text]


def test_what_the_server_keeps_is_closed_to_others(on_sqlite):
    folder = on_sqlite.folder / "mlruns/server"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "admin-password").stat().st_mode) == 0o600
    assert len(on_sqlite.password) >= 24
    assert str(folder / "admin-password") in on_sqlite.printed
    assert f"{on_sqlite.uri}/#/models?workflowType=machine_learning" in on_sqlite.printed
    assert f"sqlite:///{folder}/mlflow.db" in on_sqlite.printed


def test_a_client_is_told_what_it_has_to_set(on_sqlite, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", on_sqlite.uri)
    with pytest.raises(TrackingError, match=r"asks who you are \(401\); set MLFLOW_TRACKING_USERNAME and"):
        open_store(on_sqlite.uri, tmp_path)
    sign_in(monkeypatch, on_sqlite, "alice", "not her password")
    ok, _, advice = store_condition(tmp_path)
    assert not ok
    assert "does not accept user 'alice' with this password (401); correct MLFLOW_TRACKING_USERNAME" in advice
    sign_in(monkeypatch, on_sqlite, "alice", USERS["alice"])
    assert store_condition(tmp_path) == (True, f"{on_sqlite.uri} answers", "")
    # One of the names of this machine, as the C library reads it, that the server does not know.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.1:{on_sqlite.port}")
    with pytest.raises(TrackingError, match=r"does not answer to the name 127\.1 \(403\).*--allowed-hosts 127\.1"):
        start_run(tmp_path, experiment="e", run_name=None, tags={}, params={})


def test_a_password_that_is_not_the_admins_is_noticed(on_sqlite, capsys):
    right = Admin(file=on_sqlite.folder / "mlruns/server/admin-password", password=on_sqlite.password)
    warn_of_another_password(right, on_sqlite.uri)
    assert capsys.readouterr().err == ""
    warn_of_another_password(Admin(file=Path("other"), password="some other password"), on_sqlite.uri)
    assert "warning: other does not hold the password of admin" in capsys.readouterr().err


@pytest.mark.usefixtures("as_alice")
def test_a_job_logs_and_its_spool_is_delivered(server, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    tracker = start_run(tmp_path, experiment="jobs", run_name=None, tags={"team": "x"}, params={"seed": 0})
    tracker.metrics({"stage1/gate/layer_000": 0.5}, step=0)
    # Every request is refused from here on, as while a server is away.
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not her password")
    monkeypatch.setattr(run_module, "DRAIN_S", 1.0)
    tracker.metrics({"stage1/gate/layer_000": 0.25}, step=1)
    tracker.text("seed: 0\n", "config.yaml")
    tracker.finish("FINISHED")
    assert "`tsp sync` delivers them" in capsys.readouterr().err
    ((_, _, left),) = sync(tmp_path)
    assert left > 0
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", USERS["alice"])
    ((run_id, _, left),) = sync(tmp_path)
    assert (run_id, left) == (tracker.run_id, 0)
    assert not list(spool_folder(tmp_path).glob(f"{run_id}*"))
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params, run.data.tags["team"]) == ("FINISHED", {"seed": "0"}, "x")
    history = client.get_metric_history(run_id, "stage1/gate/layer_000")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.5), (1, 0.25)]
    (kept,) = (server.folder / "mlruns/server/artifacts").rglob("config.yaml")
    assert kept.read_text() == "seed: 0\n"


@pytest.mark.usefixtures("as_alice")
def test_a_run_that_may_not_be_written_any_more_keeps_its_records(server, tmp_path, monkeypatch):
    """A right that was taken by mistake comes back; what was held is delivered then."""
    from mlflow import MlflowClient
    from mlflow.server.auth.client import AuthServiceClient

    tracker = start_run(tmp_path, experiment="rights", run_name=None, tags={}, params={})
    experiment_id = MlflowClient(server.uri).get_run(tracker.run_id).info.experiment_id

    def alice_may(permission):
        with pytest.MonkeyPatch.context() as patch:
            sign_in(patch, server, "admin", server.password)
            rights = AuthServiceClient(server.uri)
            rights.revoke_user_permission("alice", "experiment", experiment_id)
            rights.grant_user_permission("alice", "experiment", experiment_id, permission)

    alice_may("DENY")
    monkeypatch.setattr(run_module, "DRAIN_S", 1.0)
    tracker.metrics({"loss": 1.0}, step=0)
    tracker.text("seed: 0\n", "config.yaml")
    tracker.finish("FINISHED")
    ((_, _, left),) = sync(tmp_path)
    assert left > 0
    alice_may("MANAGE")
    ((_, _, left),) = sync(tmp_path)
    run = MlflowClient(server.uri).get_run(tracker.run_id)
    assert (left, run.info.status, run.data.metrics["loss"]) == (0, "FINISHED", 1.0)


@pytest.mark.usefixtures("as_alice")
def test_a_checkpoint_is_registered_and_fetched_over_http(server, tmp_path):
    checkpoint = model_folder(tmp_path / "out" / "model", tiny_model(num_layers=2))
    tracker = start_run(tmp_path, experiment="models", run_name=None, tags={}, params={})
    wanted = {"run_id": tracker.run_id, "tags": {}, "description": "", "metadata": {}}
    name, version = register_checkpoint(tracker.uri, checkpoint, "sent", **wanted)
    tracker.finish("FINISHED")
    fetched = checkpoint_path(f"models:/{name}/{version}", tmp_path / "elsewhere")
    for path in checkpoint.iterdir():
        assert (fetched / path.name).read_bytes() == path.read_bytes()
    # What `tsp ui` prints where the store is a server.
    found = links(server.uri, server.uri)
    assert found["newest run"].startswith(f"{server.uri}/#/experiments/{tracker.experiment_id}/runs/")


def test_two_users_race_and_every_decision_counts(on_postgres, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    # Neither of the two made the model, and so has rights of her own to it.
    sign_in(monkeypatch, on_postgres, "admin", on_postgres.password)
    client = MlflowClient(on_postgres.uri)
    run = client.create_run(client.create_experiment("source")).info
    client.create_registered_model("raced")
    for number in range(2):
        client.create_model_version("raced", f"{run.artifact_uri}/{number}", run.run_id)
    racers = []
    for version, (name, password) in enumerate(USERS.items(), start=1):
        sign_in(monkeypatch, on_postgres, name, password)
        racers.append(subprocess.Popen([sys.executable, "-c", RACER, str(version)], env=python_path()))
    assert [racer.wait(timeout=200) for racer in racers] == [0, 0]
    assert Path("race.log").read_text().split() == ["in", "out"] * 6
    # Each saw what the one before had done.
    made = decisions(client, "raced")
    assert sorted(one.version for one in made) == ["1"] * 3 + ["2"] * 3
    assert all(one.carried_out for one in made)
    assert [one.previous for one in made] == ["", *(one.version for one in made[:-1])]
    assert holder(client, "raced", "champion") == made[-1].version
    assert [model.name for model in client.search_registered_models("name LIKE 'raced%'")] == ["raced"]


def python_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.parametrize(("age", "advice"), [("older", "mlflow db upgrade"), ("newer", "upgrade mlflow in the server")])
def test_a_database_of_another_mlflow_is_refused_with_who_has_to_change(postgres, tmp_path, monkeypatch, age, advice):
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    known = [script.revision for script in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions()]
    postgres.execute(f"create database {age}")
    postgres.execute("create table alembic_version (version_num varchar(32))", age)
    revision = known[3] if age == "older" else "0123456789ab"
    postgres.execute(f"insert into alembic_version values ('{revision}')", age)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", postgres.uri(age))
    with pytest.raises(TrackingError, match=rf"schema {revision}.*{advice}") as refused:
        serve(tmp_path, port=free_port())
    assert DATABASE_PASSWORD not in str(refused.value)


def test_a_database_that_does_not_let_us_in_is_named_at_once(postgres, tmp_path, monkeypatch):
    start = time.monotonic()
    for uri, reason in [
        (postgres.uri("none"), 'database "none" does not exist'),
        (postgres.uri("postgres").replace("s3cret", "wrong"), "password authentication failed"),
        (postgres.uri("postgres").replace(str(postgres.port), str(free_port())), "Connection refused"),
    ]:
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", uri)
        with pytest.raises(TrackingError, match=reason) as refused:
            serve(tmp_path, port=free_port())
        assert "of%20the" not in str(refused.value)
    assert time.monotonic() - start < 10

"""`tsp runs reap`: closes runs that nobody writes any more, and no other."""

import json
import time

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from tsp.cli import main
from tsp.tracking.spool_file import SpoolFile
from tsp.tracking.store import open_store, resolve_uri, spool_folder

HOUR_MS = 3_600_000
JOB = {"tsp.kind": "job"}


@pytest.fixture
def client(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    uri = resolve_uri(tmp_path)
    open_store(uri, tmp_path)
    return MlflowClient(uri)


def run_of(client, started_h, *, tags=JOB, signs_h=(), parent=None, experiment="0"):
    """A run that began so many hours ago, with a metric so many hours ago."""
    now = time.time_ns() // 1_000_000
    tags = {**tags, **({"mlflow.parentRunId": parent} if parent else {})}
    run_id = client.create_run(experiment, start_time=now - int(started_h * HOUR_MS), tags=tags).info.run_id
    for step, hours in enumerate(signs_h):
        client.log_metric(run_id, "system/cpu", 1.0, timestamp=now - int(hours * HOUR_MS), step=step)
    return run_id


def reap(*words):
    done = CliRunner().invoke(main, ["runs", "reap", "--json", *words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_what_has_been_silent_for_too_long_is_closed_at_its_last_sign(client):
    other = client.create_experiment("other")
    lost = run_of(client, 60, signs_h=(50, 59), experiment=other)
    never_spoke = run_of(client, 25)
    alive = [
        run_of(client, 60, signs_h=(59, 1)),
        run_of(client, 23),
        run_of(client, 60, tags={"of": "another tool"}),
    ]
    ended = run_of(client, 60)
    client.set_terminated(ended, "FINISHED")

    would = reap("--dry-run")
    assert not would["closed"]
    assert {row["run_id"] for row in would["lost"]} == {lost, never_spoke}
    assert client.get_run(lost).info.status == "RUNNING"

    assert [row["run_id"] for row in reap()["lost"]] == [row["run_id"] for row in would["lost"]]
    run = client.get_run(lost)
    assert (run.info.status, run.data.tags["tsp.failure"]) == ("KILLED", "silent for 50 h")
    assert run.info.end_time - run.info.start_time == 10 * HOUR_MS
    assert client.get_run(never_spoke).info.status == "KILLED"
    assert [client.get_run(run_id).info.status for run_id in alive] == ["RUNNING"] * 3
    assert client.get_run(ended).info.status == "FINISHED"
    assert reap()["lost"] == []
    assert {row["run_id"] for row in reap("--hours", "0.5", "--dry-run")["lost"]} == set(alive[:2])


def test_a_parent_lives_as_long_as_a_child(client):
    parent = run_of(client, 60, tags={"tsp.kind": "sweep"})
    child = run_of(client, 50, parent=parent, signs_h=(1,))
    assert reap()["lost"] == []
    client.set_terminated(child, "FINISHED", int(time.time() * 1000) - HOUR_MS)
    assert reap()["lost"] == []
    assert [row["run_id"] for row in reap("--hours", "0.5")["lost"]] == [parent]


def test_what_was_left_on_this_machine_is_delivered_at_once(client, tmp_path):
    left, held = run_of(client, 1), run_of(client, 60)
    files = {run_id: SpoolFile(spool_folder(tmp_path), run_id) for run_id in (left, held)}
    for run_id, file in files.items():
        file.open({"run_id": run_id, "uri": resolve_uri(tmp_path), "owns_run": True}, wait_s=0)
    files[left].release()
    document = reap()
    assert ([row["run_id"] for row in document["delivered"]], document["lost"]) == ([left], [])
    assert [client.get_run(run_id).info.status for run_id in (left, held)] == ["KILLED", "RUNNING"]
    files[held].release()


def test_the_table_names_them(client):
    run_id = run_of(client, 30)
    done = CliRunner().invoke(main, ["runs", "reap"])
    assert run_id in done.stdout
    assert "1 runs are KILLED now" in done.stdout
    assert CliRunner().invoke(main, ["runs", "reap"]).stdout == "no run is lost\n"

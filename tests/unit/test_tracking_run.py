"""The tracker on the embedded store: all that is logged arrives, and the status is right however the job ends."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tsp.errors import ConfigError, TrackingError
from tsp.tracking import run as run_module
from tsp.tracking.run import NullTracker, Tracker, start_run
from tsp.tracking.spool import Spool, sync
from tsp.tracking.spool_file import SpoolFile
from tsp.tracking.store import resolve_uri, spool_folder

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def client(root):
    from mlflow import MlflowClient

    return MlflowClient(resolve_uri(root))


def start(root: Path, **changes) -> Tracker:
    return start_run(root, **{"experiment": None, "run_name": None, "tags": {}, "params": {}, **changes})


def history(client, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def wait_until(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)
    return value


def test_every_metric_value_arrives_exactly(root, client):
    tracker = start(root)
    rng = np.random.default_rng(0)
    gates_SL = rng.normal(size=(300, 32)) * 10.0 ** rng.integers(-30, 30, size=(300, 32))
    for step, gates_L in enumerate(gates_SL):
        tracker.metrics({f"stage1/gate/layer_{i:03d}": value for i, value in enumerate(gates_L)}, step)
    tracker.metrics({"odd/nan": math.nan, "odd/key=[1]": np.float32(0.5)}, 3)
    tracker.finish("FINISHED")
    for i in range(32):
        assert history(client, tracker.run_id, f"stage1/gate/layer_{i:03d}") == list(enumerate(gates_SL[:, i].tolist()))
    last = client.get_run(tracker.run_id)
    assert math.isnan(last.data.metrics["odd/nan"])
    assert last.data.metrics["odd/key__1_"] == 0.5
    assert last.info.status == "FINISHED"
    assert not list(spool_folder(root).glob(f"{tracker.run_id}*"))


def test_everything_else_arrives(root, client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from-environment")
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "a", "method": "from-environment"}')
    (tmp_path / "result.json").write_text('{"ok": true}')
    tracker = start(root, run_name="mine", tags={"method": "tsp"}, params={"seed": 0, "long": "x" * 9000})
    tracker.params({f"train.option_{i}": i for i in range(150)})
    tracker.artifact(tmp_path / "result.json")
    (tmp_path / "result.json").unlink()  # It was copied at the call.
    tracker.text("lr: 1", "config/resolved.yaml")
    tracker.image(np.zeros((20, 30, 3)), "gates/heatmap", 10)
    tracker.dataset("stdlib", "f" * 64, "stdlib", "calibration")
    tracker.dataset("corpus", "abc", str(REPOSITORY), "evaluation")
    tracker.finish("FINISHED")

    run = client.get_run(tracker.run_id)
    assert tracker.experiment == "from-environment" == client.get_experiment(run.info.experiment_id).name
    assert run.info.run_name == "mine"
    assert run.data.tags["method"] == "tsp"
    assert run.data.tags["team"] == "a"
    assert {"mlflow.user", "mlflow.source.name"} <= set(run.data.tags)
    assert run.data.params["long"] == "x" * 6000
    assert run.data.params["train.option_149"] == "149"
    assert len(run.data.params) == 152
    folder = Path(run.info.artifact_uri)
    assert (folder / "result.json").read_text() == '{"ok": true}'
    assert (folder / "config" / "resolved.yaml").read_text() == "lr: 1"
    images = sorted(path.name for path in (folder / "images").iterdir())
    assert len(images) == 2
    assert all(name.startswith("gates~heatmap+step+10+timestamp+") for name in images)
    inputs = {item.dataset.name: item for item in run.inputs.dataset_inputs}
    assert inputs["stdlib"].dataset.digest == "f" * 36
    assert inputs["stdlib"].tags[0].value == "calibration"
    assert json.loads(inputs["corpus"].dataset.source) == {"uri": str(REPOSITORY)}
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    assert tracker.links("http://h:1")["experiment"].endswith(
        f"/#/experiments/{run.info.experiment_id}/runs?workflowType=machine_learning"
    )


def test_delivering_a_spool_twice_changes_nothing(root, client):
    tracker = start(root)
    tracker.finish("FINISHED")
    spool = Spool(spool_folder(root), tracker.run_id, tracker.uri, owns_run=True)
    records = [
        {"kind": "metrics", "values": {"a": 1.5, "b": math.nan}, "step": 1, "time_ms": 5},
        {"kind": "params", "values": {"p": "1"}},
        {"kind": "tags", "values": {"t": "1"}},
        {"kind": "dataset", "name": "d", "digest": "1", "source_type": "code", "source": "{}", "context": "x"},
    ]
    for _ in range(2):
        for record in records:
            spool.append(record)
        path = spool.place("image.png")
        import PIL.Image

        PIL.Image.new("RGB", (4, 4)).save(path)
        name = str(path.relative_to(spool.files))
        spool.append({"kind": "image", "file": name, "key": "x/heat", "step": 1, "time_ms": 7})
    path = spool.place("image.png")
    path.write_text("no picture")
    name = str(path.relative_to(spool.files))
    spool.append({"kind": "image", "file": name, "key": "y", "step": 1, "time_ms": 7})
    spool.append({"kind": "params", "values": {"p": "2"}})  # Refused for good: must not dam up the rest.
    spool.append({"kind": "tags", "values": {"after": "yes"}})
    assert spool.close(30)
    run = client.get_run(tracker.run_id)
    assert history(client, tracker.run_id, "a") == [(1, 1.5)]
    assert len(client.get_metric_history(tracker.run_id, "b")) == 1
    assert run.data.params == {"p": "1"}
    assert run.data.tags["after"] == "yes"
    assert len(run.inputs.dataset_inputs) == 1
    assert len(client.list_artifacts(tracker.run_id, "images")) == 2


def test_torn_and_damaged_lines_are_left_out(root, client):
    tracker = start(root)
    tracker.finish("FINISHED")
    file = SpoolFile(spool_folder(root), tracker.run_id)
    file.open({"run_id": tracker.run_id, "uri": tracker.uri, "owns_run": False}, wait_s=0)
    file.append({"kind": "metrics", "values": {"before": 1.0}, "step": 0, "time_ms": 1})
    os.write(file._fd, b'{"kind": "metr\n')
    file.append({"kind": "metrics", "values": {"between": 1.0}, "step": 0, "time_ms": 1})
    os.write(file._fd, b'{"kind": "metrics", "values": {"torn": 1')
    assert sync(root) == []  # Its writer is alive.
    file.release()
    ((run_id, _, left),) = sync(root)
    assert (run_id, left) == (tracker.run_id, 0)
    assert {"before", "between"} <= set(client.get_run(run_id).data.metrics)
    assert "torn" not in client.get_run(run_id).data.metrics
    assert client.get_run(run_id).info.status == "FINISHED"
    assert sync(root) == []


def test_failure_keeps_its_reason_and_only_the_first_finish_counts(root, client):
    tracker = start(root)
    tracker.finish("FAILED", "out of memory")
    tracker.finish("FINISHED")
    tracker.metrics({"late": 1.0}, 0)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["tsp.failure"] == "out of memory"
    assert "late" not in run.data.metrics


def test_given_run_is_continued_and_left_open(root, client, monkeypatch):
    experiment_id = client.create_experiment("given")
    given = client.create_run(experiment_id, run_name="theirs")
    monkeypatch.setenv("MLFLOW_RUN_ID", given.info.run_id)
    tracker = start(root, experiment="ignored", run_name="ignored")
    assert (tracker.run_id, tracker.experiment) == (given.info.run_id, "given")
    tracker.metrics({"a": 1.0}, 0)
    tracker.finish("FINISHED")
    run = client.get_run(given.info.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.metrics["a"] == 1.0
    assert run.info.run_name == "theirs"


def test_run_that_does_not_exist_is_an_error(root, monkeypatch):
    start(root).finish("FINISHED")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match="is not in the store"):
        start(root)


def test_tags_from_the_environment_must_be_json(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TAGS", "team=a")
    with pytest.raises(ConfigError, match="MLFLOW_TAGS must be a JSON object"):
        start(root)


def test_killed_run_ends_killed_with_all_its_records_and_can_be_resumed(root, client):
    start(root).finish("FINISHED")  # The store exists; what follows is timed.
    code = (
        "import os, sys, signal; from pathlib import Path; from tsp.tracking import run, spool\n"
        "spool.SEND_INTERVAL_S = 1000  # Nothing is delivered before the end.\n"
        "tracker = run.start_run(Path(sys.argv[1]), experiment=None, run_name=None, tags={'a': 'b'}, params={})\n"
        "for step in range(500): tracker.metrics({'stage1/gate/layer_000': step / 3}, step)\n"
        "tracker.text('hello', 'log.txt'); print(tracker.run_id, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    run_id = child.stdout.strip()
    wait_until(lambda: client.get_run(run_id).info.status != "RUNNING", 60)
    wait_until(lambda: not (spool_folder(root) / f"{run_id}.jsonl").exists(), 20)
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["tsp.failure"] == "the process disappeared"
    assert history(client, run_id, "stage1/gate/layer_000") == [(step, step / 3) for step in range(500)]
    assert (Path(run.info.artifact_uri) / "log.txt").read_text() == "hello"

    tracker = start(root, resume=run_id)
    wait_until(lambda: client.get_run(run_id).info.status == "RUNNING", 20)
    tracker.finish("FINISHED")
    assert client.get_run(run_id).info.status == "FINISHED"


def test_spool_of_a_job_whose_watcher_died_too_is_closed_by_sync(root, client):
    started = client.create_run("0")
    file = SpoolFile(spool_folder(root), started.info.run_id)
    file.open({"run_id": started.info.run_id, "uri": resolve_uri(root), "owns_run": True}, wait_s=0)
    file.release()
    assert [synced.run_id for synced in sync(root)] == [started.info.run_id]
    assert client.get_run(started.info.run_id).info.status == "KILLED"


def test_delivered_run_that_lost_only_its_clean_up_keeps_its_status(root, client):
    started = client.create_run("0")
    file = SpoolFile(spool_folder(root), started.info.run_id)
    file.open({"run_id": started.info.run_id, "uri": resolve_uri(root), "owns_run": True}, wait_s=0)
    file.append({"kind": "status", "status": "FINISHED", "time_ms": 5})
    file.send(client)
    file.release()  # The process dies here, between delivery and `remove`.
    ((_, _, left),) = sync(root)
    assert left == 0
    assert client.get_run(started.info.run_id).info.status == "FINISHED"


def test_spool_follows_a_project_folder_that_was_moved(root, client):
    started = client.create_run("0")
    file = SpoolFile(spool_folder(root), started.info.run_id)
    file.open({"run_id": started.info.run_id, "uri": "sqlite:////gone/mlflow.db", "owns_run": True}, wait_s=0)
    file.release()
    ((_, _, left),) = sync(root)
    assert left == 0
    assert client.get_run(started.info.run_id).info.status == "KILLED"


def test_deleted_run_keeps_its_spool_until_it_is_restored(root, client, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "DRAIN_S", 0.0)
    tracker = start(root)
    client.delete_run(tracker.run_id)
    tracker.metrics({"kept": 1.0}, 0)
    tracker.finish("FINISHED")
    assert "`tsp sync`" in capsys.readouterr().err
    ((_, _, left),) = sync(root)
    assert left > 0
    client.restore_run(tracker.run_id)
    ((_, _, left),) = sync(root)
    assert left == 0
    assert client.get_run(tracker.run_id).data.metrics["kept"] == 1.0


def test_null_tracker_has_the_same_verbs():
    verbs = {name for name in vars(Tracker) if not name.startswith("_")}
    assert verbs <= set(dir(NullTracker))
    assert NullTracker().links() == {}


def test_the_next_job_delivers_what_an_earlier_one_had_to_leave(root, client):
    left, held = (client.create_run("0").info.run_id for _ in range(2))
    files = {run_id: SpoolFile(spool_folder(root), run_id) for run_id in (left, held)}
    for run_id, file in files.items():
        file.open({"run_id": run_id, "uri": resolve_uri(root), "owns_run": True}, wait_s=0)
        file.append({"kind": "metrics", "values": {"loss": 2.5}, "step": 7, "time_ms": 5})
    files[left].release()
    tracker = start(root)
    wait_until(lambda: client.get_run(left).info.status == "KILLED", 60)
    assert history(client, left, "loss") == [(7, 2.5)]
    wait_until(lambda: not files[left].path.exists(), 20)
    tracker.finish("FINISHED")
    assert (client.get_run(held).info.status, history(client, held, "loss")) == ("RUNNING", [])
    files[held].remove()


@pytest.mark.slow
def test_a_store_that_is_locked_for_long_makes_nobody_wait_and_loses_nothing(root, client, caplog):
    tracker = start(root)
    holder = sqlite3.connect(resolve_uri(root).removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        started = time.monotonic()
        for step in range(50):
            tracker.metrics({"loss": step / 3}, step)
        assert time.monotonic() - started < 1
        wait_until(lambda: "records wait on disk" in caplog.text, 120)
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    tracker.finish("FINISHED")
    assert history(client, tracker.run_id, "loss") == [(step, step / 3) for step in range(50)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"

"""Which run `--resume` goes on with, asked of a real store."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from tsp.errors import ConfigError, TrackingError
from tsp.resume import clear, resumed
from tsp.tracking.earlier import EarlierRun
from tsp.tracking.run import start_run


@dataclass
class AJob:
    """The part of a job that is looked at."""

    hash: str = "0123456789abcdef"
    output: Path | None = None
    config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(tracking=SimpleNamespace(experiment="resume"))
    )


def ended(root, status, output, job_hash=AJob.hash):
    """A run of a job that ended so, and left something in its folder."""
    tags = {"job_hash": job_hash, "tsp.output": str(output)}
    tracker = start_run(root, experiment="resume", run_name=None, tags=tags, params={"seed": 0})
    (output / "state").mkdir(parents=True)
    (output / "model").mkdir()
    for name in ("state/journal.jsonl", "model/config.json", "result.json", "job.log"):
        (output / name).write_text("x")
    tracker.metrics({"loss": 1.0, "other": 1.0}, 0)
    tracker.metrics({"loss": 2.0}, 1)
    tracker.finish(status, None if status == "FINISHED" else "a power cut")
    return tracker.run_id


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_newest_unfinished_run_of_the_job(tmp_path, status):
    ended(tmp_path, status, tmp_path / "old")
    run_id = ended(tmp_path, status, tmp_path / "new")
    ended(tmp_path, "FINISHED", tmp_path / "done")
    ended(tmp_path, status, tmp_path / "other", job_hash="f" * 16)
    assert resumed(AJob(), tmp_path, "latest") == EarlierRun(run_id=run_id, output=tmp_path / "new")
    assert (tmp_path / "new/model").is_dir(), "the run may be that of a job that is alive"
    clear(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["job.log", "state"], "made anew"
    assert (tmp_path / "old/model").is_dir()


def test_the_folder_of_the_run_decides_where_one_is_given(tmp_path):
    run_id = ended(tmp_path, "KILLED", tmp_path / "old")
    ended(tmp_path, "KILLED", tmp_path / "new")
    found = resumed(AJob(output=tmp_path / "old"), tmp_path, "latest")
    assert found is not None
    assert found.run_id == run_id
    assert resumed(AJob(output=tmp_path / "empty"), tmp_path, "latest") is None


def test_nothing_there(tmp_path, caplog):
    assert resumed(AJob(), tmp_path, "latest") is None
    assert "it starts from the beginning" in caplog.text


def test_what_is_refused(tmp_path):
    done = ended(tmp_path, "FINISHED", tmp_path / "done")
    other = ended(tmp_path, "KILLED", tmp_path / "other", job_hash="f" * 16)
    killed = ended(tmp_path, "KILLED", tmp_path / "killed")
    for output, resume, words in (
        (None, done, "that run is finished"),
        (None, other, "that run is another job"),
        (None, "0" * 32, "is not in the store"),
        (tmp_path / "elsewhere", killed, "is not the folder of run"),
        (tmp_path / "other", "latest", "must be a new or an empty folder"),
        (tmp_path / "done", "latest", "must be a new or an empty folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            resumed(AJob(output=output), tmp_path, resume)
    for name in ("done", "other", "killed"):
        assert (tmp_path / name / "model/config.json").is_file(), "a refusal removes nothing"


def test_a_run_that_somebody_writes_is_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr("tsp.tracking.spool.TAKEOVER_S", 0.2)
    alive = start_run(tmp_path, experiment="resume", run_name=None, tags={}, params={})
    with pytest.raises(TrackingError, match="is being written by another process"):
        start_run(tmp_path, experiment="resume", run_name=None, tags={}, params={}, resume=alive.run_id, replays=True)
    alive.finish("FINISHED")


def test_no_point_is_told_twice(tmp_path):
    run_id = ended(tmp_path, "KILLED", tmp_path / "out")
    again = start_run(
        tmp_path, experiment="resume", run_name=None, tags={}, params={"seed": 0}, resume=run_id, replays=True
    )
    for step in range(4):
        again.metrics({"loss": step + 1.0, "other": 1.0, "third": 3.0}, step)
    again.finish("FINISHED")
    client = MlflowClient(again.uri)
    steps = {
        name: [point.step for point in client.get_metric_history(run_id, name)] for name in ("loss", "other", "third")
    }
    assert steps == {"loss": [0, 1, 2, 3], "other": [0, 1, 2, 3], "third": [0, 1, 2, 3]}
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["tsp.failure"]) == ("FINISHED", "")


def test_points_that_wait_in_the_spool_are_told(tmp_path):
    """The process died before MLflow had them."""
    run_id = ended(tmp_path, "KILLED", tmp_path / "out")
    spool = tmp_path / "mlruns/spool"
    header = f'{{"kind":"header","run_id":"{run_id}","uri":"sqlite:///{tmp_path}/mlruns/mlflow.db","owns_run":true}}\n'
    owed = '{"kind":"metrics","values":{"loss":3.0},"step":2,"time_ms":5}\n'
    (spool / f"{run_id}.jsonl").write_text(header + owed + '{"kind":"metr')
    again = start_run(tmp_path, experiment="resume", run_name=None, tags={}, params={}, resume=run_id, replays=True)
    for step in range(4):
        again.metrics({"loss": step + 1.0}, step)
    again.finish("FINISHED")
    points = MlflowClient(again.uri).get_metric_history(run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]

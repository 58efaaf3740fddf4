"""The password of a tracking server is in no file, not even in the spool of an outage; and the spool is delivered."""

import pytest

from tests.unit.test_tracking_server import Server
from tsp.errors import TrackingError
from tsp.tracking import run as run_module
from tsp.tracking.run import start_run
from tsp.tracking.spool import sync
from tsp.tracking.store import spool_folder

pytestmark = pytest.mark.slow


def test_an_outage_leaves_no_password_on_disk(tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(run_module, "DRAIN_S", 1.0)
    server, root = Server(tmp_path / "server"), tmp_path / "job"
    try:
        uri = server.uri.replace("://", "://me:SECRETword@")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        tracker = start_run(root, experiment=None, run_name=None, tags={"where": uri}, params={"at": f"{uri}/x"})
        assert "SECRET" not in "".join(tracker.links().values())
        server.kill()
        tracker.metrics({"loss": 1.5}, step=3)
        tracker.text(f"see {uri}", "note.txt")
        tracker.finish("FINISHED")
        files = [path for path in root.rglob("*") if path.is_file()]
        assert spool_folder(root) / f"{tracker.run_id}.jsonl" in files
        assert not [path for path in files if b"SECRET" in path.read_bytes()]
        said = capsys.readouterr().err
        assert "did not take all records in time" in said
        assert "SECRET" not in said
        server.start()
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        [kept] = sync(root)
        assert kept.left > 0, "without its credentials nobody can deliver it"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        [synced] = sync(root)
        assert synced.left == 0
        run = MlflowClient(uri).get_run(tracker.run_id)
        assert run.data.metrics["loss"] == 1.5
        assert run.data.params["at"] == server.uri.replace("://", "://***@") + "/x"
        assert run.info.status == "FINISHED"
        stored = b"".join(path.read_bytes() for path in (tmp_path / "server").rglob("*") if path.is_file())
        assert b"SECRET" not in stored
    finally:
        server.kill()


def test_a_server_that_is_away_is_named_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:SECRETword@127.0.0.1:9")
    with pytest.raises(TrackingError) as caught:
        start_run(tmp_path, experiment=None, run_name=None, tags={}, params={})
    assert "SECRET" not in str(caught.value)
    assert "http://127.0.0.1:9" in str(caught.value)

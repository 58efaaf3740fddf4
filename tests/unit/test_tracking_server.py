"""A real tracking server that is started, killed and started again: training never waits, and nothing is lost."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.mlflow_server import Server
from tsp.errors import TrackingError
from tsp.tracking import run as run_module
from tsp.tracking.registry import checkpoint_path, register_checkpoint
from tsp.tracking.run import start_run
from tsp.tracking.spool import sync
from tsp.tracking.store import open_store, spool_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def environment(server, monkeypatch):
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    # `open_store` sets these where the user has not; the next test shall not find them.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)


def make_checkpoint(folder: Path) -> Path:
    """A folder that looks like a checkpoint; nobody loads these weights."""
    import transformers
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "def": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    return folder


def test_checkpoint_goes_to_a_remote_registry_and_back(server, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "out" / "model")
    tracker = start_run(tmp_path, experiment="remote", run_name=None, tags={}, params={})
    wanted = {"run_id": tracker.run_id, "tags": {"k": "v"}, "description": "d", "metadata": {}}
    assert register_checkpoint(tracker.uri, checkpoint, "remote-model", **wanted) == ("remote-model", "1")
    assert register_checkpoint(tracker.uri, checkpoint, "remote-model", **wanted) == ("remote-model", "1")
    tracker.finish("FINISHED")
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model"]  # No staging folder is left.
    shutil.move(checkpoint, tmp_path / "elsewhere")
    for _ in range(2):
        folder = checkpoint_path("models:/remote-model/1", tmp_path)
        for path in (tmp_path / "elsewhere").iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()


def test_outage_costs_the_job_nothing_and_loses_nothing(server, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    tracker = start_run(tmp_path, experiment="outage", run_name=None, tags={}, params={"seed": 0})
    calls_s = []

    def log_steps(first: int, last: int) -> None:
        for step in range(first, last):
            start = time.perf_counter()
            tracker.metrics({f"stage1/gate/layer_{i:03d}": step + i / 7 for i in range(32)}, step)
            calls_s.append(time.perf_counter() - start)

    log_steps(0, 50)
    server.kill()
    log_steps(50, 300)
    tracker.image(np.zeros((8, 8, 3)), "gates/heatmap", 3)
    tracker.text("{}", "result.json")
    checkpoint = make_checkpoint(tmp_path / "out" / "model")
    assert tracker.register(checkpoint, "late", tags={"k": "v"}, description="d", metadata={}) is None
    monkeypatch.setattr(run_module, "DRAIN_S", 1.0)
    start = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - start < 15
    assert np.median(calls_s) < 1e-3
    assert max(calls_s) < 0.5
    assert "`tsp sync` delivers them" in capsys.readouterr().err
    assert (spool_folder(tmp_path) / f"{tracker.run_id}.jsonl").exists()

    start = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer"):
        open_store(server.uri, tmp_path)
    assert time.monotonic() - start < 10
    ((_, _, left),) = sync(tmp_path)
    assert left > 0

    server.start()
    ((run_id, _, left),) = sync(tmp_path)
    assert (run_id, left) == (tracker.run_id, 0)
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0"}
    for i in (0, 13, 31):
        values = {m.step: m.value for m in client.get_metric_history(run_id, f"stage1/gate/layer_{i:03d}")}
        assert values == {step: step + i / 7 for step in range(300)}
    assert {"images", "result.json"} <= {info.path for info in client.list_artifacts(run_id)}
    [version] = client.search_model_versions("name = 'late'")
    assert (version.version, version.run_id, version.tags["k"]) == ("1", run_id, "v")
    assert not list(spool_folder(tmp_path).glob(f"{run_id}*"))

"""A real tracking server that is started, killed and started again: training never waits, and nothing is lost."""

import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from tests.mlflow_server import Server
from tsp.audit import audit
from tsp.errors import TrackingError
from tsp.export import export
from tsp.tracking import registry as registry_module
from tsp.tracking import run as run_module
from tsp.tracking.fetch import checkpoint_path
from tsp.tracking.manifest import file_faults
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.results import finished_jobs
from tsp.tracking.run import start_run
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


def registered(root: Path, name: str) -> Path:
    """The checkpoint of which the first version of a model was made."""
    checkpoint = make_checkpoint(root / "out" / "model")
    tracker = start_run(root, experiment="remote", run_name=None, tags={}, params={})
    about = {"run_id": tracker.run_id, "tags": {}, "description": "", "metadata": {}}
    register_checkpoint(tracker.uri, checkpoint, name, **about)
    tracker.finish("FINISHED")
    return checkpoint


def test_two_that_fetch_a_version_at_once_both_have_it(server, tmp_path):
    checkpoint = registered(tmp_path, "fetched")
    code = (
        "from pathlib import Path; from tsp.tracking.fetch import checkpoint_path; "
        "print(checkpoint_path('models:/fetched/1', Path.cwd()))"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {rank.communicate()[0].strip().splitlines()[-1] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    [folder] = folders
    assert (Path(folder) / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_a_file_that_the_server_has_lost_is_gone(server, tmp_path):
    from mlflow import MlflowClient

    registered(tmp_path, "lossy")
    client = MlflowClient(server.uri)
    version = client.get_model_version("lossy", "1")
    assert file_faults(client, version) == []
    [lost] = [
        path for path in (server.folder / "served").rglob("model/config.json") if version.source[-32:] in str(path)
    ]
    lost.unlink()
    assert file_faults(client, version) == ["model/config.json is gone"]


class Proxy(BaseHTTPRequestHandler):
    """In front of a server; passes everything on."""

    behind = ""

    def refused(self, body: bytes) -> int:
        """A status instead of the server's answer; 0: none."""
        return 0

    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if status := self.refused(body):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = urllib.request.Request(self.behind + self.path, body or None, dict(self.headers), method=self.command)
        try:
            answer = urllib.request.urlopen(asked)
        except urllib.error.HTTPError as error:
            answer = error
        content = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, *_):
        pass


class Narrow(Proxy):
    """Lets no file through that is larger than a megabyte, as nginx does."""

    def refused(self, body):
        return 413 if self.command == "PUT" and len(body) > 2**20 else 0


class Full(Proxy):
    """Has files no more."""

    status = 0

    def refused(self, body):
        return self.status if "/mlflow-artifacts/" in self.path else 0


@contextmanager
def in_front_of(server, proxy):
    """Address of a proxy."""
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (proxy,), {"behind": server.uri}))
    Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()


@pytest.mark.parametrize("status", [500, 507])
def test_what_the_artifact_store_refuses_is_an_error_of_tracking(server, tmp_path, monkeypatch, status):
    """The requests of files fail with errors of another library, and an OSError is not always one of this disk."""
    monkeypatch.setattr(Full, "status", status)
    name = f"full-{status}"
    registered(tmp_path, name)
    tracker = start_run(tmp_path, experiment=name, run_name=None, tags={}, params={})
    tracker.finish("FINISHED")
    with in_front_of(server, Full) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setattr(registry_module, "UPLOAD_RETRIES", 0)
        for refused in (
            lambda: checkpoint_path(f"models:/{name}/1", tmp_path),
            lambda: audit(name, root=tmp_path, alias=None, files=True),
            lambda: export(f"models:/{name}/1", tmp_path / "exported", root=tmp_path),
            lambda: finished_jobs(tmp_path, name),
        ):
            with pytest.raises(TrackingError, match=str(status)):
                refused()
    assert not (tmp_path / "exported").exists()


def test_a_file_that_is_refused_for_good_holds_up_nothing(server, tmp_path, monkeypatch, caplog):
    """The model, too: the job is FINISHED and says that it is not registered."""
    from mlflow import MlflowClient

    with in_front_of(server, Narrow) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        tracker = start_run(tmp_path, experiment="narrow", run_name=None, tags={}, params={})
        (tmp_path / "large.bin").write_bytes(bytes(2**21))
        tracker.artifact(tmp_path / "large.bin")
        checkpoint = make_checkpoint(tmp_path / "out" / "model")
        assert tracker.register(checkpoint, "narrow", tags={}, description="", metadata={}) is None
        assert "413" in caplog.text
        tracker.metrics({"loss": 1.0}, step=0)
        tracker.finish("FINISHED")
    assert not list(spool_folder(tmp_path).glob("*.jsonl"))
    run = MlflowClient(server.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 1.0)


def command(word: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tsp", word], cwd=folder, capture_output=True, text=True)


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
    start = time.monotonic()
    assert command("sync", tmp_path).returncode == 1
    assert time.monotonic() - start < 60

    server.start()
    # The watcher of the job that has ended has ten minutes; `tsp sync` need not wait for it.
    assert command("sync", tmp_path).returncode == 0
    run_id = tracker.run_id
    assert not list(spool_folder(tmp_path).glob("*.jsonl"))
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

"""`tsp ui`: the real server on a real store answers, shows the run's files, prints links, leaves nothing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from tsp.cli import main
from tsp.errors import ConfigError, TrackingError
from tsp.tracking.run import start_run
from tsp.tracking.store import open_store
from tsp.tracking.ui import links, serve_ui

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A store with one finished run, which has one file."""
    folder = tmp_path_factory.mktemp("ui")
    tracker = start_run(folder, experiment="demo", run_name="first", tags={}, params={})
    tracker.text("seed: 0\n", "config.yaml")
    tracker.metrics({"stage1/gate/layer_000": 1.0}, step=0)
    tracker.finish("FINISHED")
    (folder / "run_id").write_text(tracker.run_id)
    return folder


def test_without_a_store_nothing_is_started_or_made(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no tracking store .*/mlruns/mlflow\.db"):
        serve_ui(tmp_path, free_port())
    assert list(tmp_path.iterdir()) == []


def test_port_in_use_is_refused(root):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrackingError, match=f"port {port} cannot be used .*; give another with --port"):
            serve_ui(root, port)


@pytest.mark.parametrize("port", [0, -1, 65536])
@pytest.mark.parametrize("command", [["ui"], ["server"], ["serve", "models:/small@champion"]])
def test_port_out_of_range_is_refused(command, port):
    done = CliRunner().invoke(main, [*command, "--port", str(port)])
    assert done.exit_code == 2
    assert f"'--port': {port} is not in the range" in done.stderr


def test_links_lead_to_the_training_view_of_the_newest_run(root):
    run_id = (root / "run_id").read_text()
    found = links("http://127.0.0.1:5000/", f"sqlite:///{root}/mlruns/mlflow.db")
    assert all(link.endswith("?workflowType=machine_learning") for link in found.values())
    assert found["experiments"] == "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
    assert found["models"] == "http://127.0.0.1:5000/#/models?workflowType=machine_learning"
    assert f"/runs/{run_id}/model-metrics?" in found["its charts"]
    assert re.search(r"/#/experiments/\d+/runs\?", found["beside it"])


def test_links_of_a_store_without_runs(tmp_path):
    open_store(f"sqlite:///{tmp_path}/mlruns/mlflow.db", tmp_path)
    assert set(links("http://h", f"sqlite:///{tmp_path}/mlruns/mlflow.db")) == {"experiments", "models"}


def change_note(port, run_id):
    """Status of the request that a change in the UI makes."""
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/set-tag"
    body = json.dumps({"run_id": run_id, "key": "mlflow.note.content", "value": "changed"}).encode()
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("number", "code", "options"),
    [
        (signal.SIGINT, 0, []),
        (signal.SIGTERM, 143, ["--writable"]),
        pytest.param(
            signal.SIGHUP,
            143,
            [],
            marks=pytest.mark.skipif(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="under nohup"),
        ),
    ],
)
def test_server_answers_shows_files_and_ends_whole(root, number, code, options):
    from mlflow import MlflowClient

    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "tsp", "ui", "--port", str(port), *options],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as command:
        try:
            lines = []
            while not lines or "Ctrl-C" not in lines[-1]:
                line = command.stdout.readline()
                assert line, "ended before it answered"
                lines.append(line)
            printed = "".join(lines)
            run_id = (root / "run_id").read_text()
            assert f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning" in printed
            assert re.search(rf"its charts +http://127.0.0.1:{port}/#/experiments/\d+/runs/{run_id}/", printed)
            query = urllib.parse.urlencode({"path": "config.yaml", "run_uuid": run_id})
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/get-artifact?{query}", timeout=30) as answer:
                assert answer.read() == b"seed: 0\n"
            # A person's change arrives only where it was asked for.
            assert change_note(port, run_id) == (200 if options else 503)
            tags = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db").get_run(run_id).data.tags
            assert (tags.get("mlflow.note.content") == "changed") is bool(options)
            if options:
                MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db").delete_tag(run_id, "mlflow.note.content")
            command.send_signal(number)
            assert command.wait(timeout=60) == code
        finally:
            command.kill()
    assert {path.name for path in root.iterdir()} == {"mlruns", "run_id"}
    # All of the server is gone: its port is free again.
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_tracking_server_needs_no_second_one(root, monkeypatch, capsys):
    shown = {"experiments": "http://somewhere/#/experiments"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    monkeypatch.setattr("tsp.tracking.ui.links", lambda base, uri: shown if base == uri == "http://somewhere" else {})
    with socket.socket() as server:  # It may be on this machine, on just this port.
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert serve_ui(root, server.getsockname()[1]) == 0
    assert capsys.readouterr().out.split() == ["experiments", "http://somewhere/#/experiments"]

"""`tsp compare` on real stores: a sweep of real jobs, runs made by hand, runs of earlier releases, a server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tests.finished import finished
from tests.models import REPOSITORY, corpus_file, free_port, model_folder, sample, tiny_model
from tsp.cli import main
from tsp.compare.groups import compare
from tsp.compare.outputs import as_document, log_comparison
from tsp.errors import ConfigError
from tsp.records import write_json
from tsp.tracking.note import NOTE_TAG
from tsp.tracking.results import KIND_TAG, finished_jobs, runs_by_tag
from tsp.tracking.run import start_run
from tsp.tracking.store import ensure_experiment, resolve_uri
from tsp.tracking.ui import site

SETTINGS = {
    "data.block_tokens": 16,
    "eval.block_tokens": 16,
    "eval.speed_runs": 0,
    "stage1.steps": 2,
    "stage2.steps": 2,
    "stage2.trainable": "full",
    "save": "false",
    "transfer": "finetune",
}


@pytest.fixture(scope="session")
def swept(tmp_path_factory):
    """A folder whose store holds a real sweep: two selections, two seeds."""
    root = tmp_path_factory.mktemp("swept")
    model = tiny_model()
    folder, text = model_folder(root / "tiny", model), corpus_file(root / "text.jsonl", sample(model, 100, 16))
    words = [
        "--ds",
        REPOSITORY / "ds_configs/zero2.json",
        "--model",
        folder,
        "--data",
        text,
        "--method",
        "tsp,shortgpt",
        "--seed",
        "0,1",
        "--num-drop",
        "2",
    ]
    words += ["--experiment", "swept", *(w for key, value in SETTINGS.items() for w in ("--set", f"{key}={value}"))]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "launchers/prune.py", *map(str, words)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a store for many experiments: to make one takes seconds."""
    return tmp_path_factory.mktemp("store")


def logged(root, job, *, experiment, status="FINISHED", tags=None, without=()):
    """Write a job made by hand to a store, as a real job writes its own."""
    tags = {KIND_TAG: "job", "tsp_version": "0.1", "version.torch": "2"} | (tags or {})
    tracker = start_run(root, experiment=experiment, run_name=job.name, tags=tags, params={})
    config = {"seed": job.result["seed"], "transfer": job.result["transfer"], "prune": {"method": job.name}}
    tracker.text(yaml.safe_dump(config), "config.yaml")
    tracker.text("tsp prune\n", "command.txt")
    for name, about in job.result["corpora"].items():
        tracker.dataset(name, about["fingerprint"], "text", "evaluation")
    perplexity = {
        name: {"ppl": 1.0, "num_windows": len(losses), "block_tokens": 32, "window_losses": losses}
        for name, losses in job.window_losses.items()
    }
    files = {"evaluation_pruned.json": {"perplexity": perplexity}, "result.json": job.result}
    for name, content in files.items():
        if name not in without:
            kept = {key: value for key, value in content.items() if key not in without}
            write_json(kept, root / name)
            tracker.artifact(root / name)
    tracker.finish(status)
    return tracker.run_id


def test_a_real_sweep_is_compared(swept):
    jobs = finished_jobs(swept, "swept")
    assert sorted((job.result["method"], job.result["seed"]) for job in jobs) == [
        ("shortgpt", 0), ("shortgpt", 1), ("tsp", 0), ("tsp", 1),
    ]  # fmt: skip
    for job in jobs:
        on_disk = json.loads((swept / "mlruns/output" / job.run_id / "result.json").read_text())
        assert job.result == on_disk, "a job of today is read as it is"
        evaluation = json.loads((swept / "mlruns/output" / job.run_id / "evaluation_pruned.json").read_text())
        assert list(job.window_losses["text"]) == evaluation["perplexity"]["text"]["window_losses"]
        assert job.read("figures/gate_trajectories.png").startswith(b"\x89PNG")
        assert job.read("figures/no-such.png") is None
    [group] = compare(jobs).groups
    [table] = group.tables
    assert {(row.label, len(row.jobs)) for row in table.rows} == {("tsp + finetune", 2), ("shortgpt + finetune", 2)}
    assert all(not row.differs and not row.chosen for row in table.rows)


def test_the_command_prints_one_document_and_writes_the_page(swept, monkeypatch, tmp_path):
    page = tmp_path / "page.html"
    monkeypatch.chdir(swept)
    done = CliRunner().invoke(main, ["compare", "swept", "--json", "--report", str(page), "--by", "method,seed"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["experiment"] == "swept"
    assert len(document["groups"][0]["tables"][0]["rows"]) == 4
    assert document["verdict"][0]["text"].startswith("2 of 5 layers dropped (40 %)")
    assert "Gates of tsp" in page.read_text()
    shown = CliRunner().invoke(main, ["compare", "swept"])
    assert "shortgpt" in shown.stdout
    assert document["verdict"][0]["text"] in shown.stdout


def test_the_parent_run_gets_the_comparison(swept, tmp_path):
    from mlflow import MlflowClient

    comparison = compare(finished_jobs(swept, "swept"))
    [parent] = runs_by_tag(swept, "swept", KIND_TAG, status="FINISHED").keys() & {"sweep"}
    run_id = runs_by_tag(swept, "swept", KIND_TAG)[parent]
    tracker = start_run(swept, experiment="swept", run_name=None, tags={}, params={}, resume=run_id)
    log_comparison(comparison, tracker, tmp_path / "comparison")
    tracker.finish("FINISHED")
    client = MlflowClient(resolve_uri(swept))
    names = {info.path for info in client.list_artifacts(run_id, "comparison")}
    assert {"comparison/table.json", "comparison/report.html", "comparison/layers.png"} <= names
    copy = Path(client.download_artifacts(run_id, "comparison/table.json", str(tmp_path)))
    assert json.loads(copy.read_text()) == json.loads(json.dumps(as_document(comparison)))
    assert len(finished_jobs(swept, "swept")) == 4, "the parent is no job"


def test_what_is_no_finished_job_is_left_out(root, caplog):
    run_id = logged(root, finished("sleb"), experiment="left-out")
    logged(root, finished("tail"), experiment="left-out", status="FAILED")
    logged(root, finished("ppl"), experiment="left-out", tags={KIND_TAG: "sweep"})
    logged(root, finished("random"), experiment="left-out", without=("result.json",))
    assert [job.run_id for job in finished_jobs(root, "left-out")] == [run_id]
    assert "1 finished runs of left-out have no result.json" in caplog.text


def test_a_job_of_an_earlier_release_is_listed(root):
    new = ("settings", "seed", "num_drop", "corpora", "calibration", "tuning_loss")
    made = finished("sleb", ppl=12.0, seed=3)
    logged(root, made, experiment="earlier", tags={KIND_TAG: "job"}, without=new)
    logged(root, finished("tail", ppl=14.0), experiment="earlier")
    old, today = finished_jobs(root, "earlier")
    assert not set(new) & set(json.loads(old.read("result.json")))
    assert old.result["settings"]["prune.method"] == "sleb"
    assert (old.result["seed"], old.result["num_drop"]) == (3, 2)
    assert old.result["corpora"] == made.result["corpora"]
    assert today.versions == {"tsp": "0.1", "torch": "2"}
    [group] = compare([old, today]).groups
    assert [row.method for row in group.tables[0].rows] == ["sleb", "tail"]


def test_an_unknown_experiment_is_named_with_the_known_and_the_nearest(root):
    logged(root, finished(), experiment="by-hand")
    with pytest.raises(ConfigError, match=r"no experiment 'by-hnad'.* did you mean by-hand\? known are .*Default"):
        finished_jobs(root, "by-hnad")


def test_an_experiment_without_finished_jobs_says_what_it_has(root):
    logged(root, finished(), experiment="failed", status="FAILED")
    with pytest.raises(ConfigError, match=r"'failed' has no finished job to compare \(its runs: 1 failed\)"):
        finished_jobs(root, "failed")


@pytest.mark.parametrize(
    "words", [["nothing"], ["nothing", "--by", "metod"], [], ["nothing", "--price-per-hour", "-1"]]
)
def test_wrong_input_is_exit_code_2_and_makes_nothing(words):
    done = subprocess.run(
        [sys.executable, "-m", "tsp", "compare", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert [line[:6] for line in done.stderr.strip().splitlines()].count("error:") == 1
    assert not Path("mlruns").exists()


@pytest.mark.slow
def test_a_server_is_read_like_a_file(tmp_path, monkeypatch):
    from tsp.tracking.store import open_store

    folder, port = tmp_path / "served", free_port()
    uri = f"sqlite:///{folder}/mlruns/mlflow.db"
    open_store(uri, folder)
    with site(folder / "mlruns/mlflow.db", port, writable=True):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        made = finished("sleb", ppl=12.0)
        run_id = logged(tmp_path, made, experiment="by-hand")
        [job] = finished_jobs(tmp_path, "by-hand")
        assert (job.run_id, job.result, job.window_losses) == (run_id, made.result, made.window_losses)
        assert job.link.startswith(f"http://127.0.0.1:{port}/")
        assert job.read("figures/gate_trajectories.png") is None


def test_a_new_experiment_explains_itself_and_a_users_note_stays(root):
    from mlflow import MlflowClient

    start_run(root, experiment="noted", run_name=None, tags={}, params={}).finish("FINISHED")
    client = MlflowClient(resolve_uri(root))
    experiment = client.get_experiment_by_name("noted")
    note = experiment.tags[NOTE_TAG]
    for words in ("tsp.kind", "`ppl_ratio`", 'tsp compare "noted"', "stage1/gate/layer_007"):
        assert words in note
    client.set_experiment_tag(experiment.experiment_id, NOTE_TAG, "mine")
    own = client.create_experiment("own")
    for name in ("noted", "own"):
        ensure_experiment(client, name)
    assert client.get_experiment(experiment.experiment_id).tags[NOTE_TAG] == "mine"
    assert NOTE_TAG not in client.get_experiment(own).tags

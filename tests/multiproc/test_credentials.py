"""A job among secrets: in the environment, in URIs, in options; none of them is in anything that it leaves or says."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest

from tests.models import REPOSITORY, corpus_file, model_folder, sample, tiny_model

pytestmark = pytest.mark.multiproc

# Each word is a secret; what a search finds tells where it came from.
ENVIRONMENT = {
    "HF_TOKEN": "hf_SECRETtokenOfTheHub",
    "MLFLOW_TRACKING_PASSWORD": "SECRET-password",
    "AWS_SECRET_ACCESS_KEY": "aws/SECRET+key",
    "DATABASE_URL": "postgresql://me:SECRETofDb@host/db",
    "MLFLOW_TAGS": json.dumps({"team": "red", "where": "https://me:SECRETofTags@host/x"}),
}
SETTINGS = {
    "data.block_tokens": 16,
    "eval.block_tokens": 16,
    "eval.speed_runs": 0,
    "eval.prompts": 0,
    "stage2.steps": 2,
    "tracking.run_name": "of postgresql://me:SECRETofName@host/db and SECRET-password",
}
WORDS = ["--method", "random", "--num-drop", "1", "--experiment", "for SECRETofDb", "--register", "tiny"]
WORDS += [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a model and a text, and a shell full of secrets."""
    model = tiny_model(num_layers=3)
    model_folder(tmp_path / "model", model)
    corpus_file(tmp_path / "text.jsonl", sample(model, 60, 16))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def leaks(root: Path, *texts: str) -> list[str]:
    """Files below a folder, their names included, and texts that hold a secret."""
    files = [str(path) for path in root.rglob("*") if "SECRET" in path.name]
    files += [str(path) for path in root.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
    return files + [text for text in texts if "SECRET" in text]


@pytest.mark.slow
def test_a_job_leaves_and_says_no_secret(root, launch):
    done = launch(
        REPOSITORY / "launchers/prune.py",
        *("--ds", REPOSITORY / "ds_configs/zero2.json", "--model", root / "model", "--data", root / "text.jsonl"),
        *(*WORDS, "--output", root / "out"),
        num_ranks=1,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # deepspeed itself says the command line on stdout, before anything of ours runs.
    stdout = "".join(line for line in done.stdout.splitlines(keepends=True) if "[INFO] [" not in line)
    assert leaks(root, stdout, done.stderr) == []
    assert_recorded(root)


def assert_recorded(root: Path) -> None:
    """That nothing leaks because nothing is there would be no merit."""
    with sqlite3.connect(root / "mlruns" / "mlflow.db") as store:
        [(run_name,)] = store.execute("select value from tags where key = 'mlflow.runName'").fetchall()
        tags = dict(store.execute("select key, value from tags"))
        params = dict(store.execute("select key, value from params"))
        experiments = [name for (name,) in store.execute("select name from experiments")]
    assert run_name == "of postgresql://***@host/db and ***"
    assert params["tracking.run_name"] == run_name
    assert (tags["team"], tags["where"]) == ("red", "https://***@host/x")
    assert "for ***" in experiments
    result = json.loads((root / "out" / "result.json").read_text())
    assert result["settings"]["tracking.run_name"] == run_name
    assert (result["experiment"], result["registered"]) == ("for ***", {"name": "tiny", "version": "1"})
    [command] = root.rglob("command.txt")
    assert "--set tracking.run_name=of postgresql://***@host/db and ***" in command.read_text()
    [settings] = (root / "mlruns").rglob("config.yaml")
    assert "postgresql://***@host/db" in settings.read_text()


def test_a_refusal_says_no_secret(root, command):
    """Also not through deepspeed, which at its usual level repeats the command line."""
    words = ["--model", "https://me:SECRETofHub@host/org/name", "--data", "text.jsonl"]
    done = command([sys.executable, "-m", "tsp", "prune", *words], cwd=root)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: model folder https://***@host/org/name does not exist")
    assert leaks(root, done.stdout, done.stderr) == []


def test_a_plan_says_no_secret(root, command):
    words = ["--model", "model", "--data", "text.jsonl", *WORDS, "--dry-run"]
    done = command([sys.executable, "-m", "tsp", "prune", *words], cwd=root)
    assert done.returncode == 0, done.stderr
    assert "run_name: of postgresql://***@host/db and ***" in done.stdout
    assert leaks(root, done.stdout, done.stderr) == []

"""`tsp tune` on two ranks, through the real launcher; what it leaves is a job that gives the same again."""

import json
import sys

import pytest
from mlflow import MlflowClient

from tests.models import REPOSITORY, corpus_file, free_port, model_folder, sample, tiny_model
from tsp.tracking.store import resolve_uri

pytestmark = pytest.mark.multiproc
pytest.importorskip("optuna")

SETTINGS = (
    *("data.block_tokens=16", "eval.block_tokens=16", "eval.speed_runs=0", "eval.prompts=0"),
    *("stage1.steps=2", "stage2.steps=4", "stage2.lora.rank=4", "stage2.lr=0.01", "data.tuning_blocks=8"),
)


@pytest.fixture(scope="module")
def found(command, tmp_path_factory):
    """The folder of a search on two ranks, how it ended, and its document."""
    root = tmp_path_factory.mktemp("search")
    model = tiny_model()
    given = (
        "--model",
        model_folder(root / "tiny", model),
        "--data",
        corpus_file(root / "text.jsonl", sample(model, 90, 16)),
    )
    (root / "space.yaml").write_text("stage2.lr: [0.01, 1e30]\n")
    words = [sys.executable, "-m", "tsp", "tune", "--nproc", 2, "--master-port", free_port(), "--trials", 5, "--json"]
    words += ["--ds", REPOSITORY / "ds_configs/zero3.json", "--space", "space.yaml", *given]
    done = command([*words, *(word for text in SETTINGS for word in ("--set", text))], cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, done, json.loads(done.stdout)


def test_the_ranks_agree_on_what_is_tried_and_stopped(found):
    root, done, document = found
    assert done.stderr.count("load: 5 layers") == 1, "once for all trials"
    trials = document["trials"]
    assert len(trials) == 5
    assert trials[0]["preset"]
    stopped = [trial for trial in trials if trial["state"] == "pruned"]
    assert {trial["settings"]["stage2.lr"] for trial in stopped} == {1e30}
    complete = [trial for trial in trials if trial["state"] == "complete"]
    assert complete[-1]["number"] > stopped[0]["number"]
    assert len({trial["loss"] for trial in complete}) == 1, "also after one was stopped with its weights in shards"
    client = MlflowClient(resolve_uri(root))
    runs = client.search_runs([client.get_run(document["run_id"]).info.experiment_id])
    assert len(runs) == 1 + len(trials), "one run per trial, not per rank"
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
def test_prune_takes_the_file_and_gives_the_trials_loss(found, launch):
    root, _, document = found
    words = ("--config", "tuned.yaml", "--output", "out", "--set", "save=false")
    done = launch(REPOSITORY / "launchers/prune.py", *words, num_ranks=2, cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((root / "out/result.json").read_text())
    assert result["tuning_loss"] == document["loss"]["best"] <= document["loss"]["preset"]

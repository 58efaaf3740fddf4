"""A sweep in one launch: each job gives what it gives alone, failures are left behind, finished jobs stay done."""

import json

import pytest

from tests.models import REPOSITORY, corpus_file, model_folder, sample, tiny_model
from tsp.errors import ConfigError
from tsp.sweep import _check_folder, _folder_name
from tsp.tracking.store import resolve_uri

pytestmark = pytest.mark.multiproc

SETTINGS = (
    *("data.block_tokens=16", "eval.block_tokens=16", "eval.speed_runs=0", "stage2.lora.rank=4", "save=false"),
    *("stage1.steps=4", "stage2.steps=3", "stage1.schedule=one-shot", "stage2.lr=0.01"),
)
GRID = (
    *("--method", "tsp,tail,dense", "--ratio", "0.2,0.4"),
    *("--set", "transfer=[none, finetune]", "--set", "stage2.trainable=[lora, full]"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    model = tiny_model()
    return model_folder(place / "tiny", model), corpus_file(place / "text.jsonl", sample(model, 120, 16))


@pytest.fixture(scope="module")
def prune(inputs, launch):
    """Start jobs on the tiny model."""

    def start(cwd, *words, num_ranks=1, script="launchers/prune.py"):
        model, text = inputs
        common = ("--model", model, "--data", text, *(word for text in SETTINGS for word in ("--set", text)))
        ds = REPOSITORY / "ds_configs/zero3.json"
        return launch(REPOSITORY / script, "--ds", ds, *common, *words, num_ranks=num_ranks, cwd=cwd)

    return start


def results(root, budget_s=None):
    """`result.json` of all jobs with this budget, by method, number of layers, transfer and what is trained."""
    found = {}
    for path in (root / "mlruns/output").glob("*/result.json"):
        result = json.loads(path.read_text())
        if result["settings"]["budget_s"] != budget_s:
            continue
        key = (result["method"], result["num_drop"], result["transfer"], result["settings"]["stage2.trainable"])
        assert key not in found
        found[key] = result
    return found


@pytest.fixture(scope="module")
def sweep(prune, tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    return root, prune(root, *GRID, "--experiment", "grid", script="tests/multiproc/faulty_prune.py")


@pytest.fixture(scope="module")
def client(sweep):
    from mlflow import MlflowClient

    return MlflowClient(resolve_uri(sweep[0]))


def test_every_job_ran_but_the_faulty_ones_and_the_exit_code_says_so(sweep):
    root, done = sweep
    assert done.returncode == 1, done.stderr[-3000:]
    found = results(root)
    wanted = {
        (method, num_drop, transfer, trainable)
        for method, num_drop in (("tsp", 1), ("tsp", 2), ("dense", 0))
        for transfer in ("none", "finetune")
        for trainable in ("lora", "full")
    }
    assert set(found) == wanted
    assert "ModelError: no tail today" in done.stderr


def test_the_model_is_loaded_once_and_what_is_shared_is_measured_once(sweep):
    root, done = sweep
    assert done.stderr.count("job failed") == 8
    assert done.stderr.count("load: 5 layers") == 1 + 8, "once, and again after each failure"
    for key, result in results(root).items():
        assert result["checkpoint"] is None
        assert result["registered"] is None
        assert (
            result["perplexity"]["text"]["dense"]
            == results(root)["dense", 0, "none", "lora"]["perplexity"]["text"]["dense"]
        )
        if key[0] == "dense":
            assert result["dropped"] == []
            assert result["perplexity"]["text"]["bare_drop"] == result["perplexity"]["text"]["dense"]
        if key[2] == "none":
            assert result["perplexity"]["text"]["pruned"] == result["perplexity"]["text"]["bare_drop"]


def test_one_ranking_gives_every_ratio(sweep):
    found = results(sweep[0])
    one, two = (found["tsp", number, "none", "lora"] for number in (1, 2))
    assert one["scores"] == two["scores"]
    assert set(one["dropped"]) < set(two["dropped"])


@pytest.mark.slow
def test_a_job_gives_what_it_gives_alone(sweep, prune, tmp_path):
    # The last one: many others have trained the same weights before it.
    words = ("--method", "tsp", "--ratio", "0.4", "--set", "transfer=finetune", "--set", "stage2.trainable=full")
    done = prune(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    [alone] = results(tmp_path).values()
    among_others = results(sweep[0])["tsp", 2, "finetune", "full"]
    for key in ("dropped", "scores", "perplexity", "trained_tokens", "corpora"):
        assert alone[key] == among_others[key]
    assert among_others["shared"]
    assert alone["shared"] == []


def test_parent_and_children_in_the_store(sweep, client):
    [experiment] = [e for e in client.search_experiments() if e.name == "grid"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    [parent] = [run for run in runs if run.data.tags["tsp.kind"] == "sweep"]
    children = [run for run in runs if run.data.tags["tsp.kind"] == "job"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert (parent.info.status, parent.data.tags["tsp.failure"]) == ("FAILED", "8 of 20 jobs failed")
    assert sorted(run.info.status for run in children) == ["FAILED"] * 8 + ["FINISHED"] * 12
    assert parent.data.params["transfer"] == "finetune, none"
    gated = [run for run in children if run.data.tags["method"] == "tsp"]
    for run in gated:
        history = client.get_metric_history(run.info.run_id, "stage1/gate/layer_000")
        assert [point.step for point in history] == [0, 1, 2, 3], "also where the gates were learned by another job"
    histories = {
        tuple(point.value for point in client.get_metric_history(run.info.run_id, "stage1/loss/lm")) for run in gated
    }
    assert len(histories) == 1


def test_a_second_start_does_what_is_left_below_the_same_parent(sweep, prune, client):
    root, _ = sweep
    before = set(results(root))
    done = prune(root, *GRID, "--experiment", "grid")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(results(root)) - before == {
        ("tail", number, transfer, trainable)
        for number in (1, 2)
        for transfer in ("none", "finetune")
        for trainable in ("lora", "full")
    }
    assert done.stdout.count("skipped") == 12
    experiment = client.get_experiment_by_name("grid")
    [parent] = client.search_runs([experiment.experiment_id], "tags.`tsp.kind` = 'sweep'")
    assert parent.info.status == "FINISHED"


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(sweep, prune, tmp_path):
    words = ("--method", "tail,tsp", "--ratio", "0.4", "--set", "transfer=finetune")
    more = ("--set", "stage2.trainable=[lora, full]", "--set", "budget_s=[null, 4]", "--experiment", "two")
    done = prune(tmp_path, *words, *more, num_ranks=2, script="tests/multiproc/faulty_prune.py")
    assert done.returncode == 1, done.stderr[-3000:]
    found = results(tmp_path)
    assert len(found) == 2
    for key, result in found.items():
        alone = results(sweep[0])[key]
        assert result["dropped"] == alone["dropped"]
        assert len(result["weights_gib"]) == 2
        for state, value in result["perplexity"]["text"].items():
            assert value == pytest.approx(alone["perplexity"]["text"][state], rel=1e-4), state
    in_seconds = results(tmp_path, budget_s=4)
    assert set(in_seconds) == set(found)
    for result in in_seconds.values():
        # The ranks agree on the number of steps, or they would wait for each other still.
        assert result["stage2_steps"] >= 2
        assert result["trained_tokens"] == (4 + result["stage2_steps"]) * 8 * 16


def test_what_is_wrong_with_one_job_is_said_before_any_starts(prune, tmp_path):
    done = prune(tmp_path, "--method", "tsp,shortgpt", "--set", "prune.num_drop=[1, 7]", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "prune.num_drop must be in [1, 4], got 7 (in the job prune.method tsp, prune.num_drop 7)" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_per_job_that_is_gone_on_in(prune, tmp_path):
    words = ("--method", "tail,random", "--ratio", "0.4", "--set", "save=true", "--output", tmp_path / "out")
    done = prune(tmp_path, *words, script="tests/multiproc/faulty_prune.py")
    assert done.returncode == 1, done.stderr[-3000:]
    folders = [tmp_path / "out" / f"prune.method={method}" for method in ("random", "tail")]
    assert sorted((tmp_path / "out").iterdir()) == folders
    # As of a job that failed after its model was saved.
    (folders[1] / "model").mkdir()
    (folders[1] / "model" / "half").touch()
    first = (folders[0] / "result.json").stat()
    done = prune(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("skipped") == 1
    assert (folders[0] / "result.json").stat() == first
    for folder in folders:
        assert {"result.json", "job.log", "model"} <= {file.name for file in folder.iterdir()}
    assert not (folders[1] / "model" / "half").exists()
    done = prune(tmp_path, *words, "--seed", "1")
    assert done.returncode == 2, "other jobs, whose folders these are not"
    assert "must be a new or an empty folder" in done.stderr
    assert (folders[0] / "result.json").stat() == first


def test_folders_of_jobs_are_their_own(tmp_path):
    taken = set()
    for varied in ({"stage1.steps": 1}, {"stage2.steps": 1}, {}):
        _check_folder(tmp_path / _folder_name(varied), taken)
    assert tmp_path not in taken
    with pytest.raises(ConfigError, match="another job would have"):
        _check_folder(tmp_path / _folder_name({"stage1.steps": 1}), taken)

"""The whole job through the real launcher: result, store, registered model; and what it does with wrong input."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from tests.models import REPOSITORY, corpus_file, make_identity, model_folder, sample, tiny_model
from tests.models import job as config_of
from tsp.decoder import find_decoder
from tsp.job import prepare

pytestmark = pytest.mark.multiproc

LAYERS, DOOMED = 6, (1, 4)
SETTINGS = {
    "data.block_tokens": 16,
    "eval.block_tokens": 16,
    "eval.speed_runs": 1,
    "eval.prompts": 3,
    "eval.generation_runs": 1,
    "eval.generation_batch": 2,
    "eval.generation_prompt_tokens": 4,
    "eval.generation_new_tokens": 6,
    "train.batch_size": 8,
    "stage1.schedule": "budget",
    "stage1.steps": 14,
    "stage1.lr": 0.1,
    "stage2.steps": 6,
    "stage2.gates": "anneal",
    "stage2.lora.rank": 4,
}
KEYS = {
    "schema", "run_id", "experiment", "status", "method", "transfer", "model", "num_layers", "dropped", "scores",
    "perplexity", "ppl_ratio_interval", "parameters", "speed", "seconds", "peak_memory_gib", "weights_gib",
    "trained_tokens", "checkpoint", "registered", "ppl_interval", "fidelity", "slices", "worst_slice", "generation",
    "tasks", "size_gib", "kv_cache_bytes_per_token",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model with two layers that do nothing, and text that it wrote."""
    place = tmp_path_factory.mktemp("inputs")
    model = tiny_model(num_layers=LAYERS)
    make_identity(find_decoder(model), *DOOMED)
    return model_folder(place / "tiny-model", model), corpus_file(place / "tiny-text.jsonl", sample(model, 160, 16))


@pytest.fixture(scope="module")
def job(inputs, launch, tmp_path_factory):
    """One job on two ranks: its folder, `result.json`, and the gates that the loop produced."""
    model, corpus = inputs
    root = tmp_path_factory.mktemp("job")
    os.environ["RECORDED_GATES"] = str(root / "recorded.json")
    try:
        done = launch(
            REPOSITORY / "tests/multiproc/recording_prune.py",
            *("--ds", REPOSITORY / "ds_configs/zero3.json", "--model", model, "--data", corpus, "--num-drop", "2"),
            *("--experiment", "two-ranks", "--output", root / "out"),
            *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")),
            num_ranks=2,
            cwd=root,
        )
    finally:
        del os.environ["RECORDED_GATES"]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return root, json.loads((root / "out/result.json").read_text()), json.loads((root / "recorded.json").read_text())


@pytest.fixture(scope="module")
def client(job):
    from mlflow import MlflowClient

    from tsp.tracking.store import resolve_uri

    return MlflowClient(resolve_uri(job[0]))


def test_result_json_is_that_of_the_contract(job):
    root, result, recorded = job
    assert set(result) >= KEYS
    assert result["status"] == "FINISHED"
    assert result["dropped"] == list(DOOMED)
    assert (result["num_layers"], result["method"], result["transfer"]) == (LAYERS, "tsp", "stage2")
    assert len(result["scores"]) == LAYERS
    [(corpus, perplexity)] = result["perplexity"].items()
    assert corpus == "tiny-text"
    assert set(perplexity) == {"dense", "bare_drop", "pruned"}
    assert perplexity["bare_drop"] == pytest.approx(perplexity["dense"], rel=1e-4), "the two do nothing"
    assert perplexity["pruned"] == pytest.approx(perplexity["dense"], rel=0.2)
    assert set(result["seconds"]) == {"load", "select", "transfer", "evaluate", "save", "total"}
    assert len(result["peak_memory_gib"]) == len(result["weights_gib"]) == 2
    assert result["parameters"]["pruned"] < result["parameters"]["dense"]
    assert result["trained_tokens"] == (14 + 6) * 8 * 16 == len(recorded) * 8 * 16
    assert result["checkpoint"] == str(root / "out/model")


def test_the_states_are_compared_with_the_dense_one(job):
    """Two layers that do nothing: without them the model is what it was."""
    _, result, _ = job
    fidelity, generation = result["fidelity"]["tiny-text"], result["generation"]
    assert set(fidelity) == {"bare_drop", "pruned"}
    assert fidelity["bare_drop"]["kl"] < 1e-6 < fidelity["pruned"]["kl"]
    assert fidelity["bare_drop"]["top1"] > 0.999
    assert generation["dense"]["agreement"] == generation["bare_drop"]["agreement"] == 1
    assert result["ppl_interval"]["tiny-text"]["dense"][0] < result["perplexity"]["tiny-text"]["dense"]
    assert (result["slices"], result["worst_slice"], result["tasks"]) == ({}, None, {})


def test_what_the_folders_cost_is_measured(job):
    _, result, _ = job
    a_layer = 2 * 2 * 8 * 4
    assert result["kv_cache_bytes_per_token"] == {"dense": LAYERS * a_layer, "pruned": (LAYERS - 2) * a_layer}
    for state, gib in result["size_gib"].items():
        assert gib == pytest.approx(result["parameters"][state] * 4 / 2**30)
    speed = result["speed"]["generation_tokens_per_s"]
    assert set(speed) == {"dense", "pruned"}
    assert min(speed.values()) > 0


def test_the_checkpoint_is_a_plain_folder(job):
    from transformers import AutoModelForCausalLM

    _, result, _ = job
    model, info = AutoModelForCausalLM.from_pretrained(result["checkpoint"], output_loading_info=True)
    assert model.config.num_hidden_layers == LAYERS - 2
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == result["parameters"]["pruned"]


def test_the_store_holds_every_gate_that_the_loop_produced(job, client):
    _, result, recorded = job
    for stage, num_steps in (("stage1", 14), ("stage2", 6)):
        rows = [row for row in recorded if row["stage"] == stage]
        assert len(rows) == num_steps
        for layer in range(LAYERS):
            history = client.get_metric_history(result["run_id"], f"{stage}/gate/layer_{layer:03d}")
            stored = sorted((metric.step, metric.value) for metric in history)
            assert stored == [(row["step"], row["gates"][layer]) for row in rows]
        for name in rows[0]["losses"]:
            history = client.get_metric_history(result["run_id"], f"{stage}/loss/{name}")
            assert sorted((m.step, m.value) for m in history) == [(row["step"], row["losses"][name]) for row in rows]
    assert any(row["gates"][layer] != 1 for row in recorded for layer in range(LAYERS))


def test_the_run_is_finished_and_says_what_was_done(job, client):
    _, result, _ = job
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "two-ranks"
    assert run.data.params["stage1.steps"] == "14"
    assert (run.data.tags["world_size"], run.data.tags["zero_stage"], run.data.tags["dropped"]) == ("2", "3", "1,4")
    assert len(client.search_runs([run.info.experiment_id])) == 1, "one run per job, not per rank"
    perplexity = result["perplexity"]["tiny-text"]
    for state, value in perplexity.items():
        assert run.data.metrics[f"eval/tiny-text/ppl_{state}"] == value
    files = {item.path for item in client.list_artifacts(result["run_id"])}
    assert files >= {"config.yaml", "deepspeed.json", "command.txt", "result.json", "job.log"}
    assert len(run.inputs.dataset_inputs) == 2


def test_the_registered_model_generates(job, client):
    """In a process of its own, with MLflow alone."""
    root, result, _ = job
    registered = result["registered"]
    assert registered["name"] == "tiny-model-pruned"
    version = client.get_model_version(registered["name"], str(registered["version"]))
    assert (version.run_id or version.tags["run_id"]) == result["run_id"]
    assert version.tags["dropped"] == "1,4"
    code = (
        "import sys, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "pipe = mlflow.transformers.load_model(sys.argv[2])\n"
        "text = pipe('w5 w6 w7', max_new_tokens=5, do_sample=False)[0]['generated_text']\n"
        "print('GENERATED', pipe.model.config.num_hidden_layers, text)\n"
    )
    from tsp.tracking.store import resolve_uri

    uri = f"models:/{registered['name']}/{registered['version']}"
    done = subprocess.run(
        [sys.executable, "-c", code, resolve_uri(root), uri], cwd=root, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("GENERATED")]
    words = line.split()
    assert int(words[1]) == LAYERS - 2
    assert len(words) > 5, "something was written"


@pytest.mark.slow
def test_a_number_of_layers_that_two_ranks_find(inputs, launch, tmp_path):
    """Held against a plain loop over the saved models, on the text that the job set aside."""
    from transformers import AutoModelForCausalLM

    model, corpus = inputs
    few = SETTINGS | {
        "eval.prompts": 0,
        "eval.generation_runs": 0,
        "stage2.steps": 2,
        "stage2.lr": 1e-3,
        "transfer": "stage2",
    }
    done = launch(
        REPOSITORY / "launchers/prune.py",
        *("--ds", REPOSITORY / "ds_configs/zero3.json", "--model", model, "--data", corpus, "--no-register"),
        *("--method", "sleb", "--max-ppl-ratio", "1.3", "--set", "prune.ratio=0.5", "--output", tmp_path / "out"),
        *(word for key, value in few.items() for word in ("--set", f"{key}={value}")),
        num_ranks=2,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    result = json.loads((tmp_path / "out/result.json").read_text())
    ratios = {row["num_drop"]: row["ppl_ratio"] for row in result["curve"]}
    assert ratios[len(result["dropped"])] <= 1.3 < ratios[len(result["dropped"]) + 1]
    assert "numbers of layers that were tried" in done.stdout
    settings = {"model__path": str(model), "data__source": str(corpus), "eval__block_tokens": 16}
    tuning = prepare(
        config_of(**settings, data__tuning_blocks=32),
        REPOSITORY / "ds_configs/zero3.json",
        None,
        root=tmp_path,
        world_size=1,
    ).tuning
    losses = {}
    for folder in (str(model), result["checkpoint"]):
        plain = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            each = [plain(input_ids=row[None], labels=row[None]).loss for row in tuning.blocks]
        losses[folder] = float(torch.stack(each).double().mean())
    ratio = math.exp(losses[result["checkpoint"]] - losses[str(model)])
    assert ratio == pytest.approx(ratios[len(result["dropped"])], rel=1e-4)


@pytest.mark.slow
def test_a_speed_that_cannot_be_reached_ends_with_exit_code_3(inputs, launch, tmp_path):
    model, corpus = inputs
    done = launch(
        REPOSITORY / "launchers/prune.py",
        *("--model", model, "--data", corpus, "--method", "tail", "--min-speedup", "40", "--output", tmp_path / "out"),
        *("--set", "data.block_tokens=16", "--set", "eval.block_tokens=16", "--set", "eval.speed_runs=1"),
        num_ranks=2,
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "prune.min_speedup 40 cannot be reached: the most that was measured is" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["job.log"], "nothing is saved"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--set", "data.block_tokens=63", "--set", "stage1.stepps=3", "--set", "train.batch_size=0"), "stage1.stepps"),
        (("--set", "data.block_tokens=64", "--data", "short"), "less than one block"),
    ],
    ids=["unknown-key", "short-corpus"],
)
def test_wrong_input_ends_in_one_line_and_opens_no_run(inputs, launch, tmp_path, wrong, message):
    model, _ = inputs
    short = corpus_file(tmp_path / "short.jsonl", torch.full((1, 10), 5))
    arguments = [short if word == "short" else word for word in wrong]
    done = launch(
        REPOSITORY / "launchers/prune.py",
        *("--model", model, "--data", short, "--output", tmp_path / "out", *arguments),
        num_ranks=2,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    assert message in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.jsonl"], "no run, no output, no store"

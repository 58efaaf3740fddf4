"""`--quantize int8` through the real launcher, on two ranks: all states side by side, and the folder that stays."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.models import REPOSITORY, corpus_file, logits, model_folder, sample, tiny_model

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]

SETTINGS = {
    "data.block_tokens": 16,
    "eval.block_tokens": 16,
    "eval.speed_runs": 1,
    "eval.prompts": 2,
    "stage1.steps": 4,
    "stage2.steps": 2,
}
STATES = ["dense", "bare_drop", "pruned", "quantized", "pruned_quantized"]


def tsp(*words, cwd, code):
    command = [sys.executable, "-m", "tsp", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def job(launch, tmp_path_factory):
    """Output folder, `result.json` and what was printed."""
    root = tmp_path_factory.mktemp("quantized")
    model = tiny_model(num_layers=4)
    dense = model_folder(root / "tiny", model, torch.bfloat16)
    corpus = corpus_file(root / "text.jsonl", sample(model, 120, 16))
    held = corpus_file(root / "held.jsonl", sample(model, 20, 16, seed=1))
    done = launch(
        REPOSITORY / "launchers/prune.py",
        *("--ds", REPOSITORY / "ds_configs/zero3.json", "--model", dense, "--data", corpus, "--eval-data", held),
        *("--num-drop", "1", "--quantize", "int8", "--experiment", "int8", "--output", root / "out"),
        *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")),
        num_ranks=2,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return root, json.loads((root / "out/result.json").read_text()), done.stdout


def test_the_states_stand_side_by_side(job):
    _, result, printed = job
    assert list(result["perplexity"]["held"]) == STATES
    assert list(result["speed"]["prompt_tokens_per_s"]) == STATES
    assert set(result["speed"]["plain_prompt_tokens_per_s"]) == set(STATES) - {"bare_drop"}
    assert set(result["fidelity"]["held"]) == set(STATES) - {"dense"}
    sizes = result["size_gib"]
    assert sizes["pruned_quantized"] < min(sizes["quantized"], sizes["pruned"]) < sizes["dense"]
    for state in STATES:
        assert state.replace("_", " ") in printed
    assert str(job[0] / "out/model-int8") in printed


def test_perplexity_is_that_of_the_folder_that_is_left(job):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, result, _ = job
    folder = root / "out/model-int8"
    assert result["quantized_checkpoint"] == str(folder)
    assert not (root / "out/dense-int8").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line)["text"] for line in (root / "held.jsonl").read_text().splitlines()]
    ids = [token for row in rows for token in tokenizer(row)["input_ids"]]
    blocks = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    losses = [float(F.cross_entropy(logits(model, row[None])[0, :-1], row[1:])) for row in blocks]
    perplexity = result["perplexity"]["held"]
    assert perplexity["pruned_quantized"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert perplexity["pruned_quantized"] != perplexity["pruned"]
    assert perplexity["pruned_quantized"] == pytest.approx(perplexity["pruned"], rel=0.1)
    assert perplexity["quantized"] == pytest.approx(perplexity["dense"], rel=0.1)


def test_the_run_tells_of_them_and_the_unrounded_model_is_registered(job):
    from mlflow import MlflowClient

    from tsp.tracking.store import resolve_uri

    root, result, _ = job
    client = MlflowClient(resolve_uri(root))
    run = client.get_run(result["run_id"])
    for state in ("quantized", "pruned_quantized"):
        assert run.data.metrics[f"eval/held/ppl_{state}"] == pytest.approx(result["perplexity"]["held"][state])
        assert run.data.metrics[f"prune/size_gib_{state}"] == pytest.approx(result["size_gib"][state])
    version = client.get_model_version(result["registered"]["name"], result["registered"]["version"])
    assert "torchao" not in (root / "out/model/config.json").read_text()
    assert "torchao" in (root / "out/model-int8/config.json").read_text()
    assert float(version.tags["ppl_pruned_quantized/held"]) == pytest.approx(
        result["perplexity"]["held"]["pruned_quantized"], abs=1e-4
    )


def test_a_quantized_folder_can_be_evaluated_and_is_not_pruned(job):
    root, result, _ = job
    folder = root / "out/model-int8"
    options = ["--eval-data", root / "held.jsonl", "--set", "eval.block_tokens=16", "--json"]
    found = json.loads(tsp("evaluate", "--model", folder, *options, cwd=root, code=0).stdout)
    wanted = result["perplexity"]["held"]["pruned_quantized"]
    assert found["perplexity"]["held"]["ppl"] == pytest.approx(wanted, rel=1e-4)
    assert found["size_gib"]["model"] == result["size_gib"]["pruned_quantized"]
    refused = tsp("prune", "--model", folder, "--data", root / "text.jsonl", "--num-drop", "1", cwd=root, code=2)
    assert "drop layers of the model it was made from" in refused.stderr

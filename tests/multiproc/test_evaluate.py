"""`tsp evaluate` with everything it measures: alone, and on two ranks under ZeRO-3, which must say the same."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.models import (
    REPOSITORY,
    corpus_file,
    logits,
    make_identity,
    model_folder,
    sample,
    tiny_model,
    tiny_tokenizer,
)
from tsp.decoder import find_decoder

pytestmark = pytest.mark.multiproc

LAYERS = 4
TASK = """
task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
doc_to_choice: "{{{{['w5 w6', 'w7']}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SLICES = {"five": {"regex": r"\bw5\b"}, "odd": {"field": {"kind": "odd"}}, "all": {"file": "text.jsonl"}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A dense model, another with one layer disturbed, text of the dense one, slices and a task."""
    place = tmp_path_factory.mktemp("inputs")
    dense, other = tiny_model(num_layers=LAYERS), tiny_model(num_layers=LAYERS)
    make_identity(find_decoder(other), 2)
    text = corpus_file(place / "text.jsonl", sample(dense, 21, 16))
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    rows = [row | {"kind": "odd" if number % 2 else "even"} for number, row in enumerate(rows)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "slices.yaml").write_text(json.dumps(SLICES))
    (place / "tasks").mkdir()
    (place / "tasks" / "quiz.yaml").write_text(TASK.format(data=text))
    model_folder(place / "dense", dense)
    model_folder(place / "other", other)
    return place, dense, other, rows


def words(place):
    settings = {"block_tokens": 16, "batch_size": 4, "compare_positions": 100, "prompts": 3, "speed_runs": 1}
    settings |= {"continuation_tokens": 8, "task_folder": place / "tasks", "generation_runs": 1}
    settings |= {"generation_batch": 2, "generation_prompt_tokens": 4, "generation_new_tokens": 5}
    return [
        *("--model", str(place / "other"), "--against", str(place / "dense")),
        *("--eval-data", str(place / "text.jsonl"), "--slices", str(place / "slices.yaml"), "--tasks", "quiz"),
        *(word for key, value in settings.items() for word in ("--set", f"eval.{key}={value}")),
    ]


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """What one process says; nothing but JSON on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "tsp", "evaluate", *words(inputs[0]), "--json"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path_factory.mktemp("alone"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def two(inputs, launch, tmp_path_factory):
    done = launch(
        REPOSITORY / "launchers/evaluate.py",
        *(*words(inputs[0]), "--json", "--ds", REPOSITORY / "ds_configs/zero3.json"),
        num_ranks=2,
        cwd=tmp_path_factory.mktemp("two"),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if '{"schema"' in line]
    return json.loads(line[line.index('{"schema"') :])


def blocks_of(rows):
    tokenizer = tiny_tokenizer()
    ids = [token for row in rows for token in tokenizer(row["text"])["input_ids"]]
    return torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)


def test_the_keys_of_the_contract_stay_and_the_numbers_are_plain(inputs, alone):
    _, dense, other, rows = inputs
    blocks = blocks_of(rows)
    assert set(alone) == {
        "schema", "model", "against", "perplexity", "ppl", "ppl_interval", "ppl_ratio_interval", "fidelity", "slices",
        "worst_slice", "generation", "tasks", "speed", "parameters", "size_gib", "kv_cache_bytes_per_token",
        "weights_gib", "peak_memory_gib", "corpora", "asked_tasks",
    }  # fmt: skip
    for state, model in (("dense", dense), ("model", other)):
        loss = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in blocks]).mean()
        assert alone["ppl"]["text"][state] == pytest.approx(float(loss.exp()), rel=1e-5)
    row = alone["perplexity"]["text"]
    assert row == {"ppl": alone["ppl"]["text"]["model"], "num_windows": len(blocks), "block_tokens": 16}
    about = {"name": "text", "num_windows": len(blocks), "block_tokens": 16}
    assert about.items() <= alone["corpora"]["text"].items()
    low, high = alone["ppl_ratio_interval"]["text"]["model"]
    assert low < row["ppl"] / alone["ppl"]["text"]["dense"] < high
    assert list(alone["fidelity"]["text"]) == ["model"]


def test_slices_are_those_of_the_text(inputs, alone):
    _, _, other, rows = inputs
    found = alone["slices"]["text"]
    assert set(found) == set(SLICES)
    assert found["all"]["ppl"] == pytest.approx(alone["ppl"]["text"])
    assert found["five"]["num_tokens"] < found["all"]["num_tokens"] == alone["perplexity"]["text"]["num_windows"] * 15
    # Each row is one window of 16 words.
    odd = blocks_of(rows)[1::2]
    loss = torch.stack([other(input_ids=row[None], labels=row[None]).loss for row in odd]).mean()
    assert found["odd"]["ppl"]["model"] == pytest.approx(float(loss.exp()), rel=1e-5)
    worst = alone["worst_slice"]
    ratios = {name: row["ppl"]["model"] / row["ppl"]["dense"] for name, row in found.items()}
    assert worst == {
        "corpus": "text",
        "slice": max(ratios, key=ratios.get),
        "ratio": pytest.approx(max(ratios.values())),
    }


def test_generation_tasks_sizes_and_speed(inputs, alone):
    _, dense, other, rows = inputs
    prompts = blocks_of(rows)[torch.arange(3) * 21 // 3]
    continued = {}
    for state, model in (("dense", dense), ("model", other)):
        text = prompts
        for _ in range(8):
            text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], 1)
        continued[state] = text[:, 16:]
    same = (continued["dense"] == continued["model"]).long().cumprod(1).sum(1).double().mean() / 8
    assert alone["generation"]["model"]["agreement"] == pytest.approx(float(same))
    assert alone["generation"]["dense"]["agreement"] == 1
    assert set(alone["tasks"]["quiz"]) == {"dense", "model"}
    assert set(alone["tasks"]["quiz"]["model"]) >= {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert set(alone["speed"]["generation_tokens_per_s"]) == {"dense", "model"}
    assert all(speed > 0 for kind in alone["speed"].values() for speed in kind.values())
    count = sum(parameter.numel() for parameter in dense.parameters())
    assert alone["parameters"] == {"dense": count, "model": count}
    assert alone["size_gib"]["model"] == pytest.approx(count * 4 / 2**30)
    assert alone["kv_cache_bytes_per_token"] == {"dense": LAYERS * 2 * 2 * 8 * 4, "model": LAYERS * 2 * 2 * 8 * 4}
    assert len(alone["peak_memory_gib"]) == 1


def test_two_ranks_under_zero_3_say_the_same(alone, two):
    def leaves(tree, place=()):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, (*place, key))
            else:
                yield (*place, key), value

    measured = ("ppl", "ppl_interval", "ppl_ratio_interval", "fidelity", "slices", "generation", "tasks", "size_gib")
    ours, theirs = (dict(leaves({key: result[key] for key in measured})) for result in (two, alone))
    assert ours.keys() == theirs.keys()
    assert all(two[key] for key in measured), "nothing is left out"
    for place, value in theirs.items():
        assert ours[place] == pytest.approx(value, rel=1e-4, abs=1e-6), place
    assert two["worst_slice"]["slice"] == alone["worst_slice"]["slice"]
    assert len(two["peak_memory_gib"]) == len(two["weights_gib"]) == 2
    assert two["speed"]["generation_tokens_per_s"] == {}, "in shards it would measure the network"

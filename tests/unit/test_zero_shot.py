"""Tasks on a forward function, against lm-evaluation-harness's own command on the same saved model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models import VOCABULARY, model_folder, sample, tiny_model, tiny_tokenizer
from tsp.config import EvalConfig
from tsp.errors import ConfigError, DataError
from tsp.evaluation.zero_shot import open_tasks, task_metrics
from tsp.fresh import LAUNCHER_VARIABLES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
STORIES = SHARED / "models" / "stories260k"
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_target: label
doc_to_choice: "{choices}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WHOLE = """
task: whole
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{goal}}}} {{{{sol1}}}} {{{{goal}}}} {{{{sol2}}}} {{{{goal}}}} {{{{sol2}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{goal}}}}"
doc_to_target: "{{{{sol1}}}}"
generation_kwargs: {{until: [w7], max_gen_toks: 10, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def quiz(num_rows):
    """Questions of a model's own words; some answers are of one token, some of several, two begin alike."""
    words = [" ".join(f"w{max(2, token)}" for token in row) for row in sample(tiny_model(), num_rows, 12).tolist()]
    return [
        {
            "goal": " ".join(text.split()[:7]),
            "sol1": " ".join(text.split()[7 : 8 + number % 4]),
            "sol2": " ".join([*text.split()[7 : 7 + number % 4], f"w{2 + number}"]),
            "label": number % 2,
        }
        for number, text in enumerate(words)
    ]


def write_tasks(folder, rows):
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"text": "{{goal}}", "choices": "{{[sol1, sol2]}}", "data": data}
    (folder / "quiz.yaml").write_text(CHOICE.format(name="quiz", **fields))
    (folder / "whole.yaml").write_text(WHOLE.format(data=data))
    (folder / "write.yaml").write_text(WRITE.format(data=data))
    return folder


def their_command(model, tasks, folder, output, limit, positions):
    """What `lm_eval` itself finds: its results, and the samples of each task."""
    words = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32,max_length={positions}"]
    words += ["--tasks", ",".join(tasks), "--include_path", folder, "--output_path", output, "--log_samples"]
    words += ["--device", "cpu", "--batch_size", "4", *(["--limit", str(limit)] if limit else [])]
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = output.rglob("results_*.json")
    samples = {}
    for task in tasks:
        (file,) = output.rglob(f"samples_{task}_*.jsonl")
        samples[task] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return json.loads(results.read_text())["results"], samples


def forward_of(model):
    def forward(ids):
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return forward


def responses(opened, task):
    """What the model answered to each request of each document, as our run left it in the opened task."""
    by_document = {}
    for instance in sorted(opened.loaded["tasks"][task].instances, key=lambda instance: instance.idx):
        by_document.setdefault(instance.doc_id, []).append(instance.resps[0])
    return [by_document[number] for number in sorted(by_document)]


def hold_against(ours, theirs):
    """Each metric, and each standard error that has a closed form."""
    for task, row in ours.items():
        expected = {key.removesuffix(",none"): value for key, value in theirs[task].items() if isinstance(value, float)}
        assert set(row) >= set(expected)
        for metric, value in expected.items():
            if not metric.startswith(("word_perplexity_std", "byte_perplexity_std")):
                assert row[metric] == pytest.approx(value, rel=1e-4), (task, metric)


def loglikelihoods(row):
    return [float(answer[0]) for answer in row]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model, its tasks, and what the harness's own command makes of them."""
    place = tmp_path_factory.mktemp("tasks")
    model = tiny_model()
    folder = write_tasks(place / "own", quiz(14))
    saved = model_folder(place / "model", model)
    names = ("quiz", "whole", "write")
    return model, folder, names, their_command(saved, names, folder, place / "out", None, 48)


def opened(folder, names, **changes):
    return open_tasks(EvalConfig(tasks=names, task_folder=str(folder), **changes), tiny_tokenizer(), 48)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_numbers_are_those_of_the_harness_itself(tiny, batch_size):
    """Choices, whole texts longer than the window, and writing; on the same weights."""
    model, folder, names, (results, samples) = tiny
    tasks = opened(folder, names)
    ours = task_metrics(tasks, forward_of(model), {"batch_size": batch_size})
    assert set(ours) == set(names)
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= set(ours["quiz"])
    hold_against(ours, results)
    for mine, theirs in zip(responses(tasks, "quiz"), samples["quiz"], strict=True):
        expected = [loglikelihoods(answer)[0] for answer in theirs["resps"]]
        assert loglikelihoods(mine) == pytest.approx(expected, abs=1e-4)
    for mine, theirs in zip(responses(tasks, "whole"), samples["whole"], strict=True):
        assert mine[0] == pytest.approx(float(theirs["resps"][0][0]), abs=1e-3)
    written = [row["resps"][0][0] for row in samples["write"]]
    assert [row[0] for row in responses(tasks, "write")] == written
    assert len(set(written)) > 3


def test_it_can_be_measured_again_and_for_another_state(tiny):
    model, folder, _, _ = tiny
    tasks = opened(folder, ("quiz",))
    first, other, again = (
        task_metrics(tasks, forward_of(one), {"batch_size": 4}) for one in (model, tiny_model(seed=3), model)
    )
    assert first == again
    assert responses(tasks, "quiz")
    assert other != first


def test_the_ranks_share_the_requests(tiny):
    """Two ranks as threads: each computes its half, and both hold all answers."""
    import threading

    model, folder, names, (results, _) = tiny
    meeting, sums, found, passes = threading.Barrier(2), {}, {}, [0, 0]

    def rank(number):
        def total(values):
            sums[number] = values
            meeting.wait()
            both = sums[0] + sums[1]
            meeting.wait()
            return both

        def forward(ids):
            passes[number] += 1
            return forward_of(model)(ids)

        sharing = {"batch_size": 2, "rank": number, "world_size": 2, "total": total}
        found[number] = task_metrics(tasks[number], forward, sharing)

    tasks = [opened(folder, names) for _ in range(2)]
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert found[0] == found[1]
    hold_against(found[0], results)
    assert passes[0] == passes[1], "else the ranks of a sharded model wait for each other for ever"


def test_random_answers_are_right_as_often_as_chance_has_it(tiny):
    _, folder, _, _ = tiny
    row = task_metrics(opened(folder, ("quiz",)), lambda ids: torch.zeros(*ids.shape, VOCABULARY), {"batch_size": 4})[
        "quiz"
    ]
    # All tokens are equally likely: the shorter answer wins, the first where both are equally long.
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    lengths = [(len(row["sol1"].split()), len(row["sol2"].split())) for row in rows]
    expected = [row["label"] == int(two < one) for row, (one, two) in zip(rows, lengths, strict=True)]
    assert row["acc"] == pytest.approx(sum(expected) / len(rows))


def test_limit_and_examples_before_the_question_are_obeyed(tiny):
    model, folder, _, _ = tiny
    tasks = opened(folder, ("quiz",), task_limit=5, num_fewshot=1)
    lengths = []
    task_metrics(tasks, lambda ids: lengths.append(ids.shape[1]) or forward_of(model)(ids), {"batch_size": 1})
    assert len(responses(tasks, "quiz")) == 5
    plain = []
    task_metrics(
        opened(folder, ("quiz",), task_limit=5),
        lambda ids: plain.append(ids.shape[1]) or forward_of(model)(ids),
        {"batch_size": 1},
    )
    assert min(lengths) > min(plain) + 5


def test_the_random_state_is_left_alone(tiny):
    model, folder, _, _ = tiny
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    task_metrics(opened(folder, ("quiz",)), forward_of(model), {"batch_size": 4})
    assert torch.equal(torch.rand(3), expected)


def refused(tmp_path, *names, text=None, **changes):
    folder = tmp_path / "own"
    folder.mkdir()
    if text is not None:
        (folder / "mine.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        opened(folder, names, **changes)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_task_is_refused_with_the_nearest_name(tmp_path):
    assert "knows no task hellaswga, did you mean hellaswag?" in refused(tmp_path, "hellaswga")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CHOICE.format(name="mine", data="none.jsonl", text="x", choices="{{[a]}}"), "none.jsonl"),
        (CHOICE.format(name="mine", data="rows.jsonl", text="{{goat}}", choices="{{[sol1]}}"), "goat"),
        (CHOICE.format(name="mine", data="rows.jsonl", text="x", choices="x") + "output_type: song", "song"),
    ],
    ids=["no-data", "no-such-field", "no-such-kind"],
)
def test_a_task_that_cannot_be_opened_is_refused_with_its_name(tmp_path, text, reason):
    Path("rows.jsonl").write_text(json.dumps(quiz(1)[0]) + "\n")
    message = refused(tmp_path, "mine", text=text)
    assert message.startswith("task mine cannot be opened: ")
    assert reason in message


def test_a_task_whose_data_is_elsewhere_is_refused_without_a_network(tmp_path):
    assert refused(tmp_path, "piqa").startswith("task piqa cannot be opened: ")


def test_a_folder_that_is_none_is_refused():
    with pytest.raises(DataError, match=r"eval\.task_folder must be a folder of task YAMLs, got nowhere"):
        open_tasks(EvalConfig(tasks=("piqa",), task_folder="nowhere"), tiny_tokenizer(), 48)


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert open_tasks(EvalConfig(), tiny_tokenizer(), 48) is None
    with pytest.raises(ConfigError, match=r"pip install 'tsp\[eval\]'"):
        open_tasks(EvalConfig(tasks=("piqa",)), tiny_tokenizer(), 48)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real model and task beside the project")
def test_on_a_real_model_and_task_the_scores_are_those_of_the_harness_itself(tmp_path):
    import transformers

    folder = tmp_path / "own"
    folder.mkdir()
    fields = {"text": "Question: {{goal}}\\nAnswer:", "choices": "{{[sol1, sol2]}}"}
    (folder / "p.yaml").write_text(CHOICE.format(name="piqa_here", data=SHARED / "tasks" / "piqa.jsonl", **fields))
    results, samples = their_command(STORIES, ["piqa_here"], folder, tmp_path / "out", 60, 512)
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    config = EvalConfig(tasks=("piqa_here",), task_folder=str(folder), task_limit=60)
    tasks = open_tasks(config, transformers.AutoTokenizer.from_pretrained(STORIES), 512)
    ours = task_metrics(tasks, forward_of(model), {"batch_size": 8})
    hold_against(ours, results)
    for mine, theirs in zip(responses(tasks, "piqa_here"), samples["piqa_here"], strict=True):
        expected = [float(answer[0][0]) for answer in theirs["resps"]]
        assert loglikelihoods(mine) == pytest.approx(expected, abs=1e-4)

"""`tsp monitor` as a command: two registered versions, their requests, and what a page of plain transformers says."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from tests.models import REPOSITORY, logits, make_identity, model_folder, tiny_model, tiny_tokenizer
from tsp.decoder import find_decoder
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.run import start_run
from tsp.tracking.store import resolve_uri

pytestmark = pytest.mark.multiproc

LANGUAGES = ("de", "en", "fr")
BLOCK = 40
KINDS = ("loss", "kl", "top1", "repetition")


def register(root: Path, folder: Path, base: Path) -> None:
    """As a job does: a run with its `result.json`, and a version of it."""
    tracker = start_run(root, experiment=None, run_name=None, tags={}, params={})
    settings = {
        "model.path": str(base),
        "model.revision": None,
        "model.dtype": "auto",
        "model.trust_remote_code": False,
    }
    tracker.text(json.dumps({"settings": settings}), "result.json")
    tracker.finish("FINISHED")
    wanted = {"run_id": tracker.run_id, "tags": {}, "description": "", "metadata": {}}
    register_checkpoint(tracker.uri, folder, "small", **wanted)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A store with two versions of one model, requests of unequal length, and slices by their language."""
    root = tmp_path_factory.mktemp("site")
    models = {"dense": tiny_model(num_layers=4), "1": tiny_model(num_layers=4), "2": tiny_model(num_layers=4)}
    make_identity(find_decoder(models["1"]), 1)
    make_identity(find_decoder(models["2"]), 1, 2)
    folders = {name: model_folder(root / f"model-{name}", model) for name, model in models.items()}
    for number in ("1", "2"):
        register(root, folders[number], folders["dense"])
    client = MlflowClient(resolve_uri(root))
    client.set_registered_model_alias("small", "champion", "2")
    client.set_registered_model_alias("small", "previous_champion", "1")
    draw = torch.Generator().manual_seed(0)
    rows = [
        {
            "text": " ".join(f"w{word}" for word in torch.randint(2, 96, (5 + number % 9,), generator=draw).tolist()),
            "lang": LANGUAGES[number % 3],
        }
        for number in range(60)
    ]
    (root / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "slices.yaml").write_text(json.dumps({lang: {"field": {"lang": lang}} for lang in LANGUAGES}))
    return root, models, rows


def monitor(root, *words):
    common = ["models:/small@champion", "--requests", "requests.jsonl", "--slices", "slices.yaml"]
    settings = ["--set", f"eval.block_tokens={BLOCK}", "--set", "eval.batch_size=4"]
    return subprocess.run(
        [sys.executable, "-m", "tsp", "monitor", *common, *settings, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def looks(site):
    """Three calls: kept against the version before, then bounds that are crossed, then against the dense model."""
    root, _, _ = site
    (root / "policy.yaml").write_text("champion: [ppl_ratio<=1.1]\nmonitor: [slice_top1/de>=0, kl<=1000]\n")
    before = ["--against", "models:/small@previous_champion"]
    return [
        monitor(root, *before, "--policy", "policy.yaml", "--json"),
        monitor(root, *before, "--require", "slice_kl/en<=0.000001", "--require", "loss<=1000", "--json"),
        monitor(root, "--against", "dense"),
    ]


def repeats(model, prompts):
    """Share of 4-grams that stood in the same continuation before, by transformers' own generation."""
    text = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=32, max_new_tokens=32,
        pad_token_id=0, eos_token_id=None,
    )[:, prompts.shape[1]:].tolist()  # fmt: skip
    grams = [Counter(tuple(row[start : start + 4]) for start in range(29)) for row in text]
    return sum(count - 1 for one in grams for count in one.values()) / (29 * len(text))


def by_hand(dense, state, rows):
    """Of each language, and of `all`: loss, KL, top-1 agreement, repetition."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(row["text"])["input_ids"] for row in rows]
    length = sum(map(len, ids)) // BLOCK * BLOCK
    blocks = torch.tensor([token for own in ids for token in own][:length]).view(-1, BLOCK)
    marks = [row["lang"] for row, own in zip(rows, ids, strict=True) for _ in own][:length]
    ours, theirs = (logits(model, blocks)[:, :-1].double().log_softmax(-1) for model in (state, dense))
    each = {
        "loss": -ours.gather(-1, blocks[:, 1:, None])[..., 0],
        "kl": (theirs.exp() * (theirs - ours)).sum(-1),
        "top1": (ours.argmax(-1) == theirs.argmax(-1)).double(),
    }
    found = {}
    for lang in ("all", *LANGUAGES):
        mask_NT = torch.tensor([lang in ("all", mark) for mark in marks]).view(-1, BLOCK)
        found[lang] = {kind: float(values[mask_NT[:, 1:]].mean()) for kind, values in each.items()}
        # No window is long enough for two prompts of 32 tokens.
        found[lang]["repetition"] = repeats(state, blocks[mask_NT[:, 31]][:, :32])
    return found


def test_every_slice_is_what_plain_transformers_finds(site, looks):
    _, models, rows = site
    assert looks[0].returncode == 0, looks[0].stderr[-3000:]
    measured = json.loads(looks[0].stdout)["measured"]
    expected = by_hand(models["1"], models["2"], rows)
    for kind in KINDS:
        assert measured[kind] == pytest.approx(expected["all"][kind], rel=1e-4, abs=1e-6)
        for lang in LANGUAGES:
            assert measured[f"slice_{kind}/{lang}"] == pytest.approx(expected[lang][kind], rel=1e-4, abs=1e-6), lang
    assert expected["de"]["kl"] != pytest.approx(expected["en"]["kl"], rel=0.01), "else nothing is tested"


def test_a_bound_that_is_crossed_is_refused_and_recorded(looks):
    crossed = looks[1]
    assert crossed.returncode == 3
    document = json.loads(crossed.stdout)
    last = crossed.stderr.strip().splitlines()[-1]
    kl = document["measured"]["slice_kl/en"]
    assert last == (
        "error: small version 2 does not keep 1 of 2 requirements: "
        f"slice_kl/en<=1e-06 (measured {kl})"
    )  # fmt: skip
    assert document["verdict"] == "broken"
    assert [row["verdict"] for row in document["requirements"]] == ["broken", "kept"]


def test_each_call_is_a_run_at_its_own_step(site, looks, tmp_path):
    root, models, rows = site
    client = MlflowClient(resolve_uri(root))
    experiment = client.get_experiment_by_name("small/monitoring").experiment_id
    runs = client.search_runs([experiment], order_by=["start_time ASC"])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert [run.data.tags["verdict"] for run in runs] == ["kept", "broken", "nothing required"]
    tags = runs[0].data.tags
    assert (tags["tsp.kind"], tags["model"], tags["version"]) == ("monitoring", "small", "2")
    assert (tags["against"], tags["requests"]) == ("models:/small/1", "requests.jsonl")
    document = json.loads(looks[0].stdout)
    assert tags["requests_fingerprint"] == document["requests"]["fingerprint"]
    for step, run in enumerate(runs):
        for name in ("monitor/kl", "monitor/de/kl", "monitor/fr/loss", "monitor/en/top1", "monitor/en/repetition"):
            (point,) = client.get_metric_history(run.info.run_id, name)
            assert point.step == step
    assert runs[0].data.metrics["monitor/fr/kl"] == document["measured"]["slice_kl/fr"]
    saved = Path(client.download_artifacts(runs[0].info.run_id, "monitoring.json", str(tmp_path)))
    assert json.loads(saved.read_text()) == document
    table = json.loads(
        Path(client.download_artifacts(runs[1].info.run_id, "requirements.json", str(tmp_path))).read_text()
    )
    assert [row[2] for row in table["data"]] == ["broken", "kept"]
    assert document["run_id"] == runs[0].info.run_id
    expected = by_hand(models["dense"], models["2"], rows)
    assert runs[2].data.metrics["monitor/kl"] == pytest.approx(expected["all"]["kl"], rel=1e-4)


def test_a_person_sees_the_slices_and_where_to_look(looks):
    assert looks[2].returncode == 0, looks[2].stderr[-3000:]
    for words in ("all requests", "repeats itself", "fr", "tsp ui"):
        assert words in looks[2].stdout


@pytest.mark.slow
def test_two_ranks_say_the_same_once(site, looks, launch):
    root, _, _ = site
    done = launch(
        REPOSITORY / "launchers/monitor.py", "models:/small@champion", "--against", "models:/small/1",
        "--requests", "requests.jsonl", "--slices", "slices.yaml", "--set", f"eval.block_tokens={BLOCK}", "--json",
        "--ds", REPOSITORY / "ds_configs/zero3.json", "--require", "kl<=0", num_ranks=2, cwd=root,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if '{"schema"' in line]
    two, one = json.loads(line[line.index('{"schema"') :]), json.loads(looks[0].stdout)
    assert two["step"] == 3
    for name, value in one["measured"].items():
        if name != "size_gib":
            assert two["measured"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name

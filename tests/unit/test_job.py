"""What jobs of a sweep share, what tells two jobs apart, and the text that is set aside."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.models import REPOSITORY, corpus_file, model_folder, tiny_model
from tests.models import job as config_of
from tsp.choose import order_key
from tsp.job import Preparation, inputs_of, prepare
from tsp.shared import Shared, Stopwatch

DS = REPOSITORY / "ds_configs" / "zero3.json"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Settings of a job on a tiny model and a text whose blocks can be told apart."""
    place = tmp_path_factory.mktemp("given")
    blocks = torch.arange(2, 82).repeat_interleave(16).view(80, 16)
    return {
        "model__path": str(model_folder(place / "tiny", tiny_model())),
        "data__source": str(corpus_file(place / "text.jsonl", blocks)),
        "eval__sources": (str(corpus_file(place / "held.jsonl", blocks[:20])),),
        "eval__block_tokens": 16,
    }


def made(given, **settings):
    return prepare(config_of(**given, **settings), DS, None, root=REPOSITORY, world_size=1)


def test_tuning_text_comes_beside_the_calibration_text(given):
    plain = made(given, data__max_blocks=32)
    tuned = made(given, data__max_blocks=32, data__tuning_blocks=8)
    assert plain.tuning is None
    assert len(plain.calibration.blocks) == len(tuned.calibration.blocks) == 32
    rows = [json.loads(line)["text"] for line in Path(given["data__source"]).read_text().splitlines()]
    aside = [text for text in rows if hashlib.sha256(text.encode()).digest()[0] % 10 == 1]
    # A document is a block here.
    assert len(tuned.tuning.blocks) == min(8, len(aside)) > 0
    trained = {tuple(row) for row in tuned.calibration.blocks.tolist()}
    assert not trained & {tuple(row) for row in tuned.tuning.blocks.tolist()}


def test_a_job_is_known_by_what_it_does_not_by_its_name(given):
    plain = made(given).hash
    assert made(given).hash == plain
    assert made(given, tracking__run_name="other", tracking__experiment="other").hash == plain
    others = [{"seed": 1}, {"stage2__lr": 2e-3}, {"transfer": "none"}, {"data__max_blocks": 16}, {"prune__ratio": 0.5}]
    hashes = {made(given, **other).hash for other in others}
    assert len(hashes) == len(others)
    assert plain not in hashes


def test_another_model_in_the_same_folder_is_another_job(given, tmp_path):
    folder = model_folder(tmp_path / "mine", tiny_model(seed=1))
    before = made(given | {"model__path": str(folder)}).hash
    model_folder(folder, tiny_model(seed=2))
    assert made(given | {"model__path": str(folder)}).hash != before


def test_other_tuning_text_is_another_job_and_other_inputs(given, tmp_path):
    """A row that falls into the tenth for tuning changes nothing else."""
    rows = Path(given["data__source"]).read_text().splitlines()
    source, jobs = tmp_path / "text.jsonl", []
    texts = (" ".join(f"w{(n * k) % 90}" for k in range(1, 17)) for n in range(2, 90))
    added = next(text for text in texts if hashlib.sha256(text.encode()).digest()[0] % 10 == 1)
    for more in ([], [json.dumps({"text": added})]):
        source.write_text("\n".join([*rows, *more]) + "\n")
        jobs.append(made(given | {"data__source": str(source)}, data__tuning_blocks=32))
    before, after = jobs
    assert before.calibration.fingerprint == after.calibration.fingerprint
    assert before.tuning.fingerprint != after.tuning.fingerprint
    assert before.hash != after.hash
    assert inputs_of(before)["texts"] != inputs_of(after)["texts"]


def test_layers_that_are_given_lengthen_no_other_search(given):
    assert made(given, prune__drop=(1, 2)).trace_to == 0
    assert made(given, prune__num_drop=2).trace_to == 2


def test_other_slices_in_the_same_file_are_another_job(given, tmp_path):
    slices, hashes = tmp_path / "slices.yaml", set()
    for pattern in ("w5", "w6 w6"):
        slices.write_text(f"some: {{regex: {pattern}}}\n")
        hashes.add(made(given, eval__slices=str(slices)).hash)
    assert len(hashes) == 2


def test_what_an_order_depends_on(given):
    def key(**settings):
        return order_key(made(given, **settings))

    sleb = {"prune__method": "sleb"}
    same = [
        {"seed": 1},
        {"prune__ratio": 0.4},
        {"prune__max_ppl_ratio": 1.1},
        {"prune__min_speedup": 1.1},
        {"transfer": "none"},
        {"stage2__lr": 1.0},
        {"prune__swap_rounds": 1},
        {"replaceme__ridge": 2.0},
    ]
    assert {key(**sleb, **settings) for settings in same} == {key(**sleb)}
    others = [{"prune__score_blocks": 7}, {"prune__protect_first": 1}, {"data__max_blocks": 16}]
    assert len({key(**sleb, **settings) for settings in others} | {key(**sleb)}) == 4
    assert key(seed=1) == key(), "hard gates are searched, not learned"
    learned = {"stage1__schedule": "budget"}
    assert key(**learned, seed=1) != key(**learned), "gates are learned on text in the seed's order"
    assert key(prune__method="random", seed=1) != key(prune__method="random")


def test_models_and_corpora_are_opened_once(given):
    preparation = Preparation(DS, root=REPOSITORY, world_size=1)
    one, two = (preparation.job(config_of(**given, seed=seed), None) for seed in (0, 1))
    assert one.source is two.source
    assert one.calibration is two.calibration


def test_dense_drops_nothing_and_needs_no_layers_that_may_go(given):
    job = made(given, prune__method="dense", prune__ratio=0.25)
    assert job.num_drop == 0


def test_what_is_shared_is_made_once_and_charged_to_each():
    shared, calls = Shared(), []
    watches = [Stopwatch(), Stopwatch()]
    values = [shared.once(("key", 1), watch, "select", lambda: calls.append(1) or "value") for watch in watches]
    assert values == ["value", "value"]
    assert calls == [1]
    assert watches[0].seconds == watches[1].seconds
    assert (watches[0].shared, watches[1].shared) == (set(), {"select"})
    paid = dict(watches[0].seconds)
    assert shared.once(("key", 1), watches[0], "select", lambda: calls.append(3)) == "value"
    assert (watches[0].seconds, watches[0].shared) == (paid, set()), "a job pays once"
    shared.once(("key", 2), watches[0], "select", lambda: calls.append(2))
    assert calls == [1, 2]

"""What a job is told of a selection that it has not made itself: by another job, or by the run before."""

import json
import zlib

import pytest

from tests.models import REPOSITORY, corpus_file, engine, model_folder, sample, tiny_model
from tests.models import job as config_of
from tsp.choose import choose
from tsp.job import prepare
from tsp.journal import Journal
from tsp.methods.trsp import stage1
from tsp.pipeline import make_bench, transfer
from tsp.shared import Shared, Stopwatch
from tsp.tracking.null import NullTracker


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = tmp_path_factory.mktemp("choose")
    model = tiny_model(num_layers=4)
    model_folder(found / "tiny", model)
    corpus_file(found / "text.jsonl", sample(model, 40, 16))
    return found


@pytest.fixture
def chosen(place):
    """Chooses for a job as a process of its own would; the bench, the doomed layers, the seconds and the job."""

    def run(shared, path=None, **settings):
        given = {"model__path": str(place / "tiny"), "data__source": str(place / "text.jsonl"), "prune__num_drop": 1}
        few = {"prune__score_blocks": 8, "prune__verify_blocks": 8, "eval__block_tokens": 16}
        config = config_of(**given, **few, **settings)
        job = prepare(config, REPOSITORY / "ds_configs" / "zero3.json", None, root=place, world_size=1)
        own, watch = engine(config), Stopwatch()
        journal = Journal.open(path, own, lambda: job.hash) if path else None
        bench = make_bench(job, own, NullTracker(), shared=shared, watch=watch, journal=journal)
        with own.mounted(bench.decoder.model) as bench.model:
            _, selection = choose(bench, job, shared, watch)
        bench.model = None
        return bench, selection.doomed, watch, job

    return run


def test_the_next_job_with_the_same_order_is_told_all_that_its_making_left(chosen, monkeypatch):
    numbers, lm_loss = iter(range(99)), stage1.lm_loss
    spoilt = [1.0, float("nan")] + [1.0] * 97
    monkeypatch.setattr(stage1, "lm_loss", lambda *given: lm_loss(*given) * spoilt[next(numbers)])
    shared, settings = Shared(), {"stage1__schedule": "one-shot", "stage1__steps": 15, "tracking__log_every": 10}
    first, second = (chosen(shared, **settings)[0] for _ in range(2))
    assert (first.global_step, first.left_out, first.logged[-1][0]) == (15, 1, 10)
    for name in ("global_step", "left_out", "trained_tokens", "logged", "gate_history"):
        assert getattr(second, name) == getattr(first, name), name


def test_seconds_that_the_run_before_has_spent_on_the_selection_count(chosen, tmp_path):
    path, settings = tmp_path / "journal.jsonl", {"prune__method": "sleb", "transfer": "finetune", "budget_s": 300.0}
    chosen(Shared(), path, **settings)
    lines = []
    for line in path.read_text().splitlines():
        text = json.dumps(json.loads(line.partition(" ")[2]) | {"seconds": 200.0})
        lines.append(f"{zlib.crc32(text.encode()):08x} {text}\n")
    path.write_text("".join(lines))
    assert len(lines) > 1

    shared = Shared()
    bench, doomed, watch, job = chosen(shared, path, **settings)
    assert watch.seconds["select"] == pytest.approx(200 * len(lines), abs=100)
    transfer(job, bench, doomed, watch)
    assert bench.transfer_steps == 0, "nothing of the budget is left"
    next_watch = chosen(shared, stage2__steps=7, **settings)[2]
    assert next_watch.seconds["select"] == pytest.approx(watch.seconds["select"], abs=1), "it is charged as much"

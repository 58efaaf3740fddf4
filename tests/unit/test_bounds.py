"""A number of layers that the job finds itself: the search on curves made by hand, and real jobs on tiny models."""

import math
from operator import itemgetter

import pytest
import torch

from tests.models import REPOSITORY, corpus_file, engine, make_identity, model_folder, sample, tiny_model
from tests.models import job as config_of
from tsp.bounds import most_within
from tsp.config import PruneSection, number_to_drop
from tsp.decoder import find_decoder
from tsp.errors import BoundError, ConfigError
from tsp.job import prepare
from tsp.methods.base import Bench
from tsp.pipeline import run_job
from tsp.shared import Shared

CURVES = {
    "straight": lambda k: math.exp(0.02 * k),
    "convex": lambda k: math.exp(0.002 * k**2.5),
    "concave": lambda k: math.exp(0.05 * math.sqrt(k)),
    "cliff": lambda k: 1.001 if k < 23 else 50.0,
    "better at first": lambda k: math.exp(0.001 * k * (k - 9)),
    "no number": lambda k: math.inf if k > 5 else 1.02,
    "free": lambda k: 1.0,
    "hopeless": lambda k: 100.0 + k,
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("bound", [1.0001, 1.05, 1.5, 20.0])
@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 7), (4, 15), (15, 15), (8, 31), (20, 79)])
def test_the_largest_number_within_the_bound_is_found_in_few_trials(curve, bound, first, last):
    tried = []

    def ratio_of(k):
        tried.append(k)
        return CURVES[curve](k)

    found = most_within(bound, ratio_of, first, last)
    # Losses that fall at first grow again: the largest of all is found there too.
    assert found == max([k for k in range(1, last + 1) if CURVES[curve](k) <= bound], default=0)
    assert tried[0] == first
    assert len(tried) == len(set(tried)) <= 2 + 2.5 * math.log2(last)
    assert set(tried) <= set(range(1, last + 1))


@pytest.mark.parametrize(("bound", "found"), [(1.10, 3), (1.15, 4)])
def test_a_loss_that_grows_as_it_does_takes_two_trials(bound, found):
    # Of the demo: 4 of 16 layers give 1.135 and the loss grows with about the square of their number.
    tried = []
    assert most_within(bound, lambda k: tried.append(k) or math.exp(0.0079 * k * k), 4, 15) == found
    assert len(tried) == 2


@pytest.mark.parametrize("seed", range(20))
def test_where_the_loss_goes_up_and_down_what_is_found_is_within_and_the_next_is_not(seed):
    ratios = torch.exp(0.3 * torch.randn(32, generator=torch.Generator().manual_seed(seed))).tolist()
    tried = set()
    found = most_within(1.1, lambda k: tried.add(k) or ratios[k], 8, 31)
    assert found == 0 or (ratios[found] <= 1.1 and found in tried)
    assert found == 31 or (ratios[found + 1] > 1.1 and found + 1 in tried)


def test_a_bound_leaves_the_number_open():
    assert number_to_drop(PruneSection(max_ppl_ratio=1.1), 16) is None
    assert number_to_drop(PruneSection(min_speedup=1.1), 16) is None
    assert number_to_drop(PruneSection(method="dense"), 16) == 0
    with pytest.raises(ConfigError, match="prune.ratio drops 0 of 16 layers"):
        number_to_drop(PruneSection(max_ppl_ratio=1.1, ratio=0.01), 16)
    with pytest.raises(ConfigError, match="prune.min_speedup 1.1 needs a model of at least 2 layers, got 1"):
        number_to_drop(PruneSection(min_speedup=1.1), 1)


LAYERS, DOOMED = 6, (1, 4)
DS = REPOSITORY / "ds_configs" / "zero3.json"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Settings of a job on a model with two layers that do nothing, and text that it wrote."""
    place = tmp_path_factory.mktemp("given")
    model = tiny_model(num_layers=LAYERS)
    make_identity(find_decoder(model), *DOOMED)
    return {
        "model__path": str(model_folder(place / "tiny", model)),
        "data__source": str(corpus_file(place / "text.jsonl", sample(model, 160, 16))),
        "data__tuning_blocks": 16,
        "eval__block_tokens": 16,
        "eval__speed_runs": 3,
        "eval__prompts": 0,
        "prune__score_blocks": 8,
        "prune__verify_blocks": 8,
        "save": False,
        "stage1__steps": 4,
        "stage2__steps": 3,
        "stage2__lr": 0.001,
        "stage2__lora__rank": 4,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One store for all jobs here: to make one takes seconds."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture
def done(given, root):
    """Runs a job in this process."""

    def run(shared=None, stage=0, output=None, **settings):
        config = config_of(**given | settings)
        job = prepare(config, DS, output, root=root, world_size=1, resume=True)
        return run_job(job, engine(config, stage), root, shared or Shared())[0]

    return run


OUTCOME = itemgetter("dropped", "perplexity", "fidelity", "tuning_loss", "trained_tokens", "stage2_steps")


def test_layers_that_do_nothing_are_what_may_go(done):
    result = done(prune__method="sleb", prune__max_ppl_ratio=1.001, transfer="none")
    assert result["dropped"] == list(DOOMED)
    assert [row["num_drop"] for row in result["curve"]] == [2, 3, 4]
    assert all(row["ppl_ratio"] == row["ppl_ratio_bare"] for row in result["curve"])
    assert result["curve"][0]["ppl_ratio"] == pytest.approx(1, abs=1e-5)
    assert result["curve"][1]["ppl_ratio"] > 1.1


@pytest.mark.parametrize(
    ("stage", "bound", "settings"),
    [
        (3, 1.3, {"prune__method": "tsp"}),
        (3, 1.3, {"prune__method": "sleb", "transfer": "finetune", "stage2__trainable": "full"}),
        (0, 1.3, {"prune__method": "shortgpt", "transfer": "distill"}),
        (0, 4.0, {"prune__method": "angular", "transfer": "merge", "prune__protect_first": 1}),
    ],
    ids=["gates", "trace", "ranking", "block"],
)
def test_the_outcome_is_that_of_the_number_given(done, stage, bound, settings):
    # So loose that numbers above the one it begins with are tried, and so tight that some of them are too many.
    found = done(stage=stage, prune__max_ppl_ratio=bound, **settings)
    ratios = {row["num_drop"]: row["ppl_ratio"] for row in found["curve"]}
    assert ratios[found["num_drop"]] <= bound < ratios[found["num_drop"] + 1]
    alone = done(stage=stage, prune__num_drop=found["num_drop"], **settings)
    assert OUTCOME(found) == OUTCOME(alone)
    assert alone["curve"] == []


class CutOff(Exception):  # noqa: N818  No error: it stands for a kill.
    """The job is cut off here."""


def test_a_search_that_goes_on_trains_only_what_is_left_of_the_trial_that_was_cut_off(done, tmp_path, monkeypatch):
    settings = {"prune__method": "sleb", "transfer": "finetune", "stage2__trainable": "full", "state__every_steps": 1}
    settings |= {"prune__max_ppl_ratio": 1.3, "prune__protect_first": 1}
    steps, stop, log = [], None, Bench.log

    def logged(bench, stage, stats, gates, more=None):
        log(bench, stage, stats, gates, more)
        steps.append(stats.step)
        if len(steps) == stop:
            raise CutOff

    monkeypatch.setattr(Bench, "log", logged)
    whole = done(**settings)
    # Tried in the order 2, 4, 3.
    assert [row["num_drop"] for row in whole["curve"] if row["ppl_ratio"] <= 1.3] == [2]
    assert steps == [0, 1, 2] * 3

    stop = len(steps) - 1
    steps.clear()
    with pytest.raises(CutOff):
        done(output=tmp_path / "out", **settings)
    states = sorted((tmp_path / "out/state").glob("*.safetensors"), key=lambda path: path.name)
    assert [int(path.name[:8]) for path in states] == [1, 2, 3], "of the outcome so far, and of the one that is cut off"
    stop = None
    steps.clear()
    found = done(output=tmp_path / "out", **settings)
    assert steps == [1, 2]
    assert OUTCOME(found) == OUTCOME(whole)
    assert found["curve"] == whole["curve"]
    assert not list((tmp_path / "out/state").glob("*.safetensors"))


def test_the_fewest_layers_that_are_fast_enough(done):
    result = done(prune__method="tail", prune__min_speedup=1.2)
    *slower, last = result["curve"]
    assert last["speedup"] >= 1.2 > max((row["speedup"] for row in slower), default=0)
    assert [row["num_drop"] for row in result["curve"]] == list(range(1, result["num_drop"] + 1))
    assert len(result["dropped"]) == result["num_drop"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prune__min_speedup": 40.0},
            r"prune.min_speedup 40 cannot be reached: the most that was measured is \d.* of 6",
        ),
        (
            {"prune__max_ppl_ratio": 1.0001, "prune__protect_first": 5},
            "prune.max_ppl_ratio 1.0001 cannot be kept: .*1 of 6",
        ),
        (
            {"prune__max_ppl_ratio": 9.0, "transfer": "finetune", "stage2__lr": 1e30, "stage2__trainable": "full"},
            "prune.max_ppl_ratio 9 cannot be kept: the least that was measured, on the tuning text, is inf times",
        ),
    ],
    ids=["speed", "perplexity", "no number"],
)
def test_a_bound_that_cannot_be_reached_is_measured_and_refused(done, root, settings, message):
    from mlflow import MlflowClient

    from tsp.tracking.store import resolve_uri

    with pytest.raises(BoundError, match=message) as caught:
        done(**{"prune__method": "ppl", "transfer": "none", "tracking__experiment": "refused"} | settings)
    assert caught.value.exit_code == 3
    client = MlflowClient(resolve_uri(root))
    experiment = client.get_experiment_by_name("refused").experiment_id
    run = client.search_runs([experiment], order_by=["attributes.start_time DESC"])[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["tsp.failure"] == f"BoundError: {caught.value}"
    assert any(name.startswith("bound/") for name in run.data.metrics)


def test_a_number_that_is_refused_is_too_many(done):
    """Five of six layers from the end are all but the last: the first has none before it to be merged into."""
    result = done(prune__method="tail", transfer="merge", prune__max_ppl_ratio=1e9)
    assert result["num_drop"] == 4
    assert [set(row) for row in result["curve"]] == [{"num_drop", "ppl_ratio", "ppl_ratio_bare"}] * 2 + [{"num_drop"}]


def test_the_next_job_of_a_sweep_finds_the_model_as_it_was(done):
    settings = {"prune__method": "tail", "transfer": "finetune"}
    shared = Shared(more_to_come=True)
    found = done(shared, prune__max_ppl_ratio=3.0, **settings)
    after = done(shared, prune__num_drop=2, **settings)
    assert len(found["curve"]) > 1
    assert OUTCOME(after) == OUTCOME(done(prune__num_drop=2, **settings))

"""The search on a tiny model, in this process: what it tries, keeps, stops and leaves, and what it never looks at."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from tests import models
from tests.models import corpus_file, model_folder, sample, tiny_model
from tests.models import job as config_of
from tsp.cli import launched_prune
from tsp.engine import Engine
from tsp.errors import ConfigError, TspError
from tsp.options import configs_from_options, differing
from tsp.search import prepare_search
from tsp.space import read_space, with_settings
from tsp.tracking.store import resolve_uri
from tsp.tune import _Launch, run_search

pytest.importorskip("optuna")

SPACE = {"stage2.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "stage2.gates": ["off", "anneal"]}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    place = tmp_path_factory.mktemp("given")
    model = tiny_model(num_layers=4)
    blocks = sample(model, 60, 16)
    (place / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    return {
        "place": place,
        "model__path": str(model_folder(place / "tiny", model)),
        "data__source": str(corpus_file(place / "text.jsonl", blocks)),
        "data__tuning_blocks": 8,
        "eval__sources": (str(corpus_file(place / "held.jsonl", blocks[:8])),),
        "eval__block_tokens": 16,
        "prune__method": "tail",
        "stage2__steps": 6,
        "stage2__lr": 1e-3,
        "stage2__lora__rank": 2,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One store for all: to make one takes seconds."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def search(given, root):
    """Runs a search in this process, whose best settings go to a folder; returns its document."""
    models.engine(config_of())

    def run(folder, space=SPACE, *, minutes=30.0, trials=1, **settings):
        settings = {key: value for key, value in {**given, **settings}.items() if key != "place"}
        config = config_of(**settings)
        ready = prepare_search(
            config,
            read_space(space, config),
            given["place"] / "ds.json",
            minutes=minutes,
            max_trials=trials,
            best=folder / "tuned.yaml",
            differing=differing,
            root=root,
            world_size=1,
        )
        return run_search(ready, root)[0]

    with pytest.MonkeyPatch.context() as patch:
        # One thread: the engine shares the cores among the ranks of the node.
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "64"}.items():
            patch.setenv(name, value)
        # The process group is that of all tests.
        patch.setattr(Engine, "stop", lambda engine: None)
        yield run


@pytest.fixture(scope="module")
def done(search, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    return folder, search(folder, trials=3)


def test_the_preset_comes_first_and_the_best_is_never_worse(done):
    _, document = done
    first, *others = document["trials"]
    assert (first["preset"], first["settings"], first["state"]) == (True, {}, "complete")
    assert document["preset"] == {"stage2.lr": 1e-3, "stage2.gates": "off"}
    assert all(set(trial["settings"]) == set(SPACE) for trial in others)
    losses = [trial["loss"] for trial in document["trials"]]
    assert len(set(losses)) == 3
    assert document["loss"]["preset"] == losses[0]
    assert document["loss"]["best"] == min(losses) == losses[document["best"]]
    assert document["loss"]["dense"] < document["loss"]["bare_drop"]


def test_the_file_of_the_best_is_taken_by_prune(done, given):
    folder, document = done
    text = (folder / "tuned.yaml").read_text()
    head = text.splitlines()[:3]
    assert head[0].startswith(f"# Found by `tsp tune`, search {document['search']}")
    assert f"loss {document['loss']['best']:.4f} on 6 blocks" in head[2], "all that a tenth of the documents has"
    assert f"the preset {document['loss']['preset']:.4f}" in head[2]
    words = ["--config", str(folder / "tuned.yaml")]
    [(_, config)] = configs_from_options(launched_prune.make_context("prune", words).params)
    own = config_of(**{key: value for key, value in given.items() if key != "place"})
    wanted = with_settings(own, document["settings"])
    assert config.model_dump(exclude={"tracking"}) == wanted.model_dump(exclude={"tracking"})


def test_parent_and_children_in_the_store(done, root):
    _, document = done
    client = MlflowClient(resolve_uri(root))
    parent = client.get_run(document["run_id"])
    assert (parent.info.status, parent.data.tags["tsp.kind"]) == ("FINISHED", "tune")
    assert parent.data.metrics["tune/loss"] == document["loss"]["best"]
    assert parent.data.params["stage2.gates"] == "off, anneal"
    assert {item.path for item in client.list_artifacts(document["run_id"])} == {"search.json", "tuned.yaml"}
    for trial in document["trials"]:
        run = client.get_run(trial["run_id"])
        assert (run.info.status, run.data.tags["tsp.kind"]) == ("FINISHED", "trial")
        assert run.data.tags["mlflow.parentRunId"] == document["run_id"]
        assert (run.data.tags["trial"], run.data.tags["trial_state"]) == (str(trial["number"]), "complete")
        assert run.data.metrics["tune/loss"] == trial["loss"]
        assert "job_hash" not in run.data.tags, "a sweep would take it for a finished job"
        assert len(client.get_metric_history(trial["run_id"], "stage2/loss/lm")) == 6


def test_the_same_command_goes_on_and_another_search_takes_another_file(done, search):
    folder, document = done
    more = search(folder, trials=4)
    assert more["trials"][:3] == document["trials"]
    assert len(more["trials"]) == 4
    assert more["run_id"] == document["run_id"]
    for minutes in (30.0, 1e-9):
        again = search(folder, trials=4, minutes=minutes)
        assert again["trials"] == more["trials"], "all trials are done, or no time is left"
    with pytest.raises(ConfigError, match=r"tuned.yaml is there and not of this search; move it away"):
        search(folder, trials=4, seed=1)


def test_tuning_text_decides_and_evaluation_text_does_not(done, search, given, tmp_path):
    first = done[1]["trials"][0]["loss"]
    other = str(corpus_file(tmp_path / "other.jsonl", models.tokens(9, 16)))
    unseen, otherwise = (
        search(tmp_path / name, **settings)["loss"]["preset"]
        for name, settings in (("a", {"eval__sources": (other,)}), ("b", {"data__tuning_blocks": 3}))
    )
    assert unseen == first
    assert otherwise != first


@pytest.mark.slow
def test_trials_that_are_not_worth_their_time_are_stopped(search, root, tmp_path):
    trials = search(tmp_path, {"stage2.lr": [1e-3, 0.3, 1e30]}, trials=9)["trials"]
    stopped = [trial for trial in trials if trial["state"] == "pruned"]
    reasons = {trial["settings"]["stage2.lr"]: trial["reason"] for trial in stopped}
    assert set(reasons) == {0.3, 1e30}
    assert "behind the median after 3 steps, with " in reasons[0.3]
    assert "the loss of step 2 is nan" in reasons[1e30]
    own = [trial for trial in trials if trial["settings"].get("stage2.lr", 1e-3) == 1e-3]
    assert own[-1]["number"] > stopped[0]["number"]
    assert len({trial["loss"] for trial in own}) == 1, "the weights are put back, to the last bit"
    client = MlflowClient(resolve_uri(root))
    run = client.get_run(stopped[0]["run_id"])
    assert (run.info.status, run.data.tags["trial_state"]) == ("FINISHED", "pruned")
    assert "tune/loss" not in run.data.metrics


def test_a_failed_trial_is_left_behind(search, tmp_path):
    # There is no layer that may go.
    trials = search(tmp_path, {"prune.protect_first": [0, 4]}, trials=5)["trials"]
    failed = [trial for trial in trials if trial["state"] == "failed"]
    assert failed
    for trial in failed:
        assert trial["settings"] == {"prune.protect_first": 4}
        assert trial["reason"].startswith("ConfigError: ")
    complete = [trial for trial in trials if trial["state"] == "complete"]
    assert complete[-1]["number"] > failed[0]["number"], "the search goes on"
    assert len({trial["loss"] for trial in complete}) == 1


def test_without_any_result_it_says_why(search, tmp_path):
    with pytest.raises(TspError, match="no trial of 1 came to its end; the last one: the loss of step 2 is nan"):
        search(tmp_path / "a", {"stage2.lr": [1e29, 1e30]}, stage2__lr=1e30)
    assert not (tmp_path / "a/tuned.yaml").exists()
    with pytest.raises(TspError, match="no trial of 0 came to its end; give more than 1e-09 minutes"):
        search(tmp_path / "b", minutes=1e-9, seed=7)


@pytest.mark.parametrize(
    ("elapsed", "seconds", "room"), [(60, [], True), (101, [], False), (60, [30, 40], True), (60, [30, 60], False)]
)
def test_no_trial_is_begun_that_would_end_too_late(elapsed, seconds, room):
    begun = SimpleNamespace(max_trials=None, seconds=100, started=time.monotonic() - elapsed)
    launch = _Launch(begun, None, None, None, "")
    launch._study = SimpleNamespace(trials=list)
    launch._seconds = seconds
    assert launch._has_room() is room


def test_a_bound_is_refused(search, tmp_path):
    with pytest.raises(ConfigError, match=r"give it \(--num-drop\) instead of prune.max_ppl_ratio 1.1"):
        search(tmp_path, prune__max_ppl_ratio=1.1)


def test_a_file_that_cannot_be_written_is_refused_before_the_search(search):
    with pytest.raises(ConfigError, match="--best /proc/tuned.yaml cannot be written"):
        search(Path("/proc"))

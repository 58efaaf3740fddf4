"""Promotion from evidence to alias, on an embedded store with real versions and results made by hand."""

import itertools
import json
import multiprocessing
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.finished import finished
from tests.unit.test_tracking_registry import make_checkpoint
from tsp.audit import audit
from tsp.errors import ConfigError, ModelError
from tsp.policy import read_policy, read_requirement
from tsp.promote import Outcome, Wanted, promote, roll_back
from tsp.tracking.fetch import checkpoint_path
from tsp.tracking.lock import locked
from tsp.tracking.promotion import Decision, move, recorded
from tsp.tracking.registry import register_checkpoint
from tsp.tracking.run import start_run
from tsp.tracking.versions import evidence_of, find_version, record_evaluation, registry, versions_of

PPL = {"1": 11.0, "2": 11.5, "3": float("nan"), "4": 10.5}
"""Of the versions; the dense model has 10."""


@dataclass
class Shop:
    """A registered model of its own, with four versions, in a store that the tests share."""

    root: Path
    name: str

    def ask(self, version: str, *required: str, **changes) -> Outcome:
        requirements = tuple(map(read_requirement, required))
        wanted = Wanted(name=self.name, version=version, requirements=requirements, **changes)
        return promote(wanted, root=self.root)

    def roll_back(self, expected: str | None = None) -> Outcome:
        return roll_back(self.name, alias="champion", reason="slow", expected=expected, dry_run=False, root=self.root)

    def audit(self, alias: str | None = None, *, files: bool = False) -> dict:
        return audit(self.name, root=self.root, alias=alias, files=files)

    def aliases(self) -> dict[str, str]:
        with registry(self.root) as client:
            found = client.get_registered_model(self.name).aliases
        return {alias: str(number) for alias, number in found.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A store with four versions of `made`, by jobs that have measured them, and one of `foreign`, by nobody's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
            patch.delenv(name, raising=False)
        root = tmp_path_factory.mktemp("store")
        checkpoint = make_checkpoint(root / "model")
        for ppl in PPL.values():
            tracker = start_run(root, experiment=None, run_name=None, tags={}, params={})
            perplexity = {"wiki": {"dense": 10.0, "bare_drop": 20.0, "pruned": ppl}}
            result = root / "result.json"
            result.write_text(json.dumps(finished().result | {"checkpoint": "out", "perplexity": perplexity}))
            tracker.artifact(result)
            tracker.finish("FINISHED")
            about = {"run_id": tracker.run_id, "tags": {}, "description": "", "metadata": {}}
            register_checkpoint(tracker.uri, checkpoint, "made", **about)
        with registry(root) as client:
            client.create_registered_model("foreign")
            client.create_model_version("foreign", source=str(checkpoint))
        yield root


_NUMBERS = itertools.count()


@pytest.fixture
def shop(root, request):
    # The aliases "a b" and "a/b" of one test must not share a model.
    name = re.sub(r"\W", "-", request.node.name) + f"-{next(_NUMBERS)}"
    with registry(root) as client:
        client.create_registered_model(name)
        for made in versions_of(client, "made"):
            client.create_model_version(name, made.source, made.run_id, tags=made.tags, model_id=made.model_id)
    return Shop(root, name)


def test_a_version_that_keeps_all_is_promoted_and_one_that_does_not_is_refused_in_a_run(shop):
    first = shop.ask("1", "ppl_ratio<=1.10", "vs_champion.ppl_ratio<=1.01", "round_trip==ok", reason="the first")
    assert first.decision.outcome == "accepted"
    assert [verdict.verdict for verdict in first.decision.verdicts] == ["kept", "not needed", "kept", "kept"]
    refused = shop.ask("2", "ppl_ratio<=1.20", "vs_champion.ppl_ratio<=1.01")
    assert refused.decision.refusal == "vs_champion.ppl_ratio<=1.01 is broken: 1.04545"
    assert shop.aliases() == {"champion": "1"}
    with registry(shop.root) as client:
        for outcome, decided in ((first, "accepted"), (refused, "refused")):
            run = client.get_run(outcome.run_id)
            assert run.data.tags["decision"] == decided
            version = client.get_model_version(shop.name, outcome.decision.version)
            assert version.tags["promotion.champion"] == f"{decided} {outcome.run_id}"
        assert run.data.metrics["vs_champion.ppl_ratio"] == pytest.approx(11.5 / 11.0)
        assert set(run.data.tags["evidence"].split(",")) == {
            find_version(client, shop.name, "1").run_id, find_version(client, shop.name, "2").run_id,
        }  # fmt: skip


def test_what_was_not_measured_or_is_no_number_never_passes(shop):
    missing = shop.ask("1", "zero_shot/piqa_drop<=0.02")
    assert f"`tsp promote {shop.name} 1 --alias champion --evaluate --tasks piqa`" in missing.decision.refusal
    assert "ppl_ratio<=1000 is broken: nan" in shop.ask("3", "ppl_ratio<=1000").decision.refusal
    assert "ppl_ratio>=0 is broken: nan" in shop.ask("3", "ppl_ratio>=0").decision.refusal
    assert shop.aliases() == {}


def test_without_requirements_the_round_trip_is_required(shop):
    assert [verdict.requirement for verdict in shop.ask("1").decision.verdicts] == ["round_trip==ok", "files==ok"]
    foreign = promote(Wanted(name="foreign", version="1"), root=shop.root)
    assert "round_trip==ok is not measured" in foreign.decision.refusal


def test_a_policy_asks_by_alias_and_its_hash_is_recorded(shop, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("shadow: [ppl_ratio<=1.2]\nchampion: [ppl_ratio<=1.10]\n")
    policy = read_policy(path)
    assert shop.ask("2", policy=policy, alias="shadow").decision.outcome == "accepted"
    outcome = shop.ask("2", policy=policy)
    assert outcome.decision.outcome == "refused"
    with registry(shop.root) as client:
        assert client.get_run(outcome.run_id).data.tags["policy"] == f"{path} {policy.hash}"
    with pytest.raises(ConfigError, match="did you mean champion"):
        shop.ask("2", policy=policy, alias="champoin")


def test_on_the_way_versions_are_compared_with_the_champion(shop):
    shop.ask("1")
    assert "is broken: 1.04545" in shop.ask("2", "vs_champion.ppl_ratio<=1.01", alias="shadow").decision.refusal
    assert shop.ask("4", "vs_champion.ppl_ratio<=1.01", alias="shadow").decision.outcome == "accepted"


def test_the_champion_again_changes_nothing(shop):
    shop.ask("1")
    again = shop.ask("1", "ppl_ratio<=0.1")
    assert again.unchanged
    assert len(shop.audit()["decisions"]) == 1


def test_the_expected_champion_is_held_against_who_it_is(shop):
    assert shop.ask("1", expected="none").decision.outcome == "accepted"
    refused = shop.ask("2", expected="3")
    assert refused.decision.refusal == "version 1 has champion, --expect-champion said 3"
    assert shop.ask("2", expected="1").decision.outcome == "accepted"


def test_a_dry_run_leaves_no_trace(shop):
    outcome = shop.ask("1", "ppl_ratio<=1.10", dry_run=True)
    assert (outcome.decision.outcome, outcome.run_id) == ("accepted", None)
    assert shop.ask("2", "ppl_ratio<=1.10", dry_run=True).decision.outcome == "refused"
    assert shop.aliases() == {}
    assert shop.audit()["decisions"] == []


def race(root: Path, name: str, version: str, ready, outcomes) -> None:
    """One user's process. Both have judged against version 1 before either may decide."""
    wanted = Wanted(name=name, version=version)
    outcomes.put(promote(wanted, root=root, measure=lambda *_: ready.wait(timeout=200) and None))


def test_of_two_at_once_one_wins_and_the_other_is_told(shop):
    shop.ask("1")
    # Processes, as two users are: mlflow has one default store per process.
    spawn = multiprocessing.get_context("spawn")
    ready, queue = spawn.Barrier(2), spawn.Queue()
    racers = [spawn.Process(target=race, args=(shop.root, shop.name, version, ready, queue)) for version in ("2", "4")]
    for racer in racers:
        racer.start()
    outcomes = [queue.get(timeout=300) for _ in racers]
    for racer in racers:
        racer.join(timeout=60)
    won, lost = sorted((outcome.decision for outcome in outcomes), key=lambda decision: decision.outcome)
    assert (won.outcome, lost.outcome) == ("accepted", "refused")
    assert lost.refusal == f"champion went from version 1 to {won.version} in the meantime: decide again"
    assert shop.aliases() == {"champion": won.version, "previous_champion": "1"}
    assert shop.audit()["faults"] == []


def test_rolling_back_goes_one_back_each_time(shop):
    for version in ("1", "2", "4"):
        shop.ask(version)
    assert shop.roll_back().decision.version == "2"
    assert shop.aliases() == {"champion": "2", "previous_champion": "1"}
    assert shop.roll_back().decision.version == "1"
    assert shop.aliases() == {"champion": "1"}
    with pytest.raises(ModelError, match=rf"no version had {shop.name}@champion before \(version 1 has it now\)"):
        shop.roll_back()
    assert shop.audit()["faults"] == []
    refused = shop.ask("4") and shop.roll_back("2")
    assert refused.decision.outcome == "refused"


def test_later_evaluations_count_and_the_newest_wins(shop):
    with registry(shop.root) as client:
        version = find_version(client, shop.name, "1")
        document = {
            "corpora": {"wiki": {"fingerprint": "f" * 16, "num_windows": 40, "block_tokens": 32}},
            "perplexity": {"wiki": {"ppl": 15.0}},
            "ppl": {"wiki": {"dense": 10.0, "model": 15.0}},
            "speed": {},
        }
        record_evaluation(client, version, document, {"ppl_ratio": 1.5})
        assert [one.document["perplexity"]["wiki"].get("ppl") for one in evidence_of(client, version)] == [None, 15.0]
    assert "ppl_ratio<=1.2 is broken: 1.5" in shop.ask("1", "ppl_ratio<=1.2").decision.refusal


def test_lost_files_are_wrong_input_and_changed_ones_a_refusal(shop):
    config = checkpoint_path(f"models:/{shop.name}/1", shop.root) / "config.json"
    content = config.read_text()
    config.write_text(content + "\n")
    assert "files==ok is broken: model/config.json changed" in shop.ask("1").decision.refusal
    assert shop.audit(files=True)["faults"] == ["version 1: model/config.json changed"]
    config.unlink()
    with pytest.raises(ModelError, match=f"version 1 of {shop.name} has lost its files"):
        shop.ask("1")
    config.write_text(content)


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("mode", "1", "did you mean made"),
        ("made", "9", "it has 1, 2, 3, 4"),
        ("made", "champion", "version or"),
    ],
)
def test_unknown_models_and_versions_are_wrong_input(shop, name, version, reason):
    with pytest.raises(ModelError, match=reason):
        promote(Wanted(name=name, version=version), root=shop.root)


@pytest.mark.parametrize("alias", ["latest", "v2", "", "1", "a b", "a/b"])
def test_what_is_no_alias_is_wrong_input(shop, alias):
    with pytest.raises(ConfigError, match="an alias must be"):
        shop.ask("1", alias=alias)


def test_audit_finds_what_was_moved_by_hand(shop):
    shop.ask("1")
    with registry(shop.root) as client:
        client.set_registered_model_alias(shop.name, "champion", "4")
        client.set_registered_model_alias(shop.name, "mine", "2")
    assert shop.audit()["faults"] == [
        "champion leads to version 4, and the last decision says version 1: somebody moved it by hand",
        "mine leads to version 2, and no decision says so: somebody set it by hand",
    ]
    assert len(shop.audit("champion")["faults"]) == 1
    with registry(shop.root) as client:
        client.delete_registered_model_alias(shop.name, "champion")
    (fault,) = shop.audit("champion")["faults"]
    assert fault.startswith("champion is gone")


def test_audit_finds_a_decision_that_was_not_carried_out(shop):
    one = Decision(kind="promotion", model=shop.name, version="2", alias="champion", previous=None, behind=None)
    with registry(shop.root) as client, pytest.raises(RuntimeError), locked(client, shop.name), recorded(client, one):
        raise RuntimeError("power")
    (fault,) = shop.audit()["faults"]
    assert "was interrupted: decide again" in fault
    shop.ask("2")
    assert shop.audit()["faults"] == []


@pytest.mark.parametrize("writes", [1, 2])
def test_a_rollback_that_was_interrupted_goes_back_by_one_when_it_is_asked_for_again(shop, writes):
    for version in ("1", "2", "4"):
        shop.ask(version)
    one = Decision(kind="rollback", model=shop.name, version="2", alias="champion", previous="4", behind="1")
    with registry(shop.root) as client, pytest.raises(RuntimeError), locked(client, shop.name), recorded(client, one):
        for alias, version in (("previous_champion", "1"), ("champion", "2"))[:writes]:
            client.set_registered_model_alias(shop.name, alias, version)
        raise RuntimeError("power")
    assert shop.roll_back("4").decision.outcome == "accepted"
    assert shop.aliases() == {"champion": "2", "previous_champion": "1"}
    assert shop.audit()["faults"] == []
    assert shop.roll_back().decision.version == "1"


def test_a_promotion_that_was_interrupted_before_the_move_is_no_turn(shop):
    for version in ("1", "2"):
        shop.ask(version)
    one = Decision(kind="promotion", model=shop.name, version="4", alias="champion", previous="2", behind="2")
    with registry(shop.root) as client, pytest.raises(RuntimeError), locked(client, shop.name), recorded(client, one):
        client.set_registered_model_alias(shop.name, "previous_champion", "2")
        raise RuntimeError("power")
    assert shop.roll_back().decision.version == "1"
    assert shop.aliases() == {"champion": "1"}


def test_settling_compares_with_who_was_there_before_and_takes_the_same_words(shop):
    shop.ask("1")
    with registry(shop.root) as client:
        client.set_registered_model_alias(shop.name, "champion", "2")
    refused = shop.ask("2", "vs_champion.ppl_ratio<=1.01")
    assert refused.decision.refusal == "vs_champion.ppl_ratio<=1.01 is broken: 1.04545"
    assert shop.ask("2", expected="4").decision.outcome == "refused"
    assert shop.ask("2", expected="1").decision.outcome == "accepted"
    assert shop.aliases() == {"champion": "2", "previous_champion": "1"}


@pytest.mark.parametrize("before", [(), ("1",)])
def test_a_promotion_that_was_interrupted_behind_the_move_is_settled_by_itself(shop, before):
    for version in before:
        shop.ask(version)
    behind = before[-1] if before else None
    one = Decision(kind="promotion", model=shop.name, version="2", alias="champion", previous=behind, behind=behind)
    with registry(shop.root) as client, pytest.raises(RuntimeError), locked(client, shop.name), recorded(client, one):
        move(client, one)
        raise RuntimeError("power")
    assert "interrupted" in shop.audit()["faults"][-1]
    settled = shop.ask("2")
    assert (settled.unchanged, settled.decision.outcome) == (False, "accepted")
    assert shop.audit()["faults"] == []
    assert shop.ask("2").unchanged
    if before:
        assert shop.roll_back().decision.version == "1"


def test_an_alias_that_was_given_by_hand_is_taken_on(shop):
    shop.ask("1")
    with registry(shop.root) as client:
        client.set_registered_model_alias(shop.name, "champion", "4")
    assert not shop.ask("4").unchanged
    assert shop.audit()["faults"] == []
    assert shop.aliases() == {"champion": "4", "previous_champion": "1"}


def test_a_deleted_version_is_no_fault_of_the_aliases(shop):
    for version in ("1", "2", "4"):
        shop.ask(version)
    with registry(shop.root) as client:
        made = find_version(client, shop.name, "1")
        client.create_model_version(shop.name, made.source, made.run_id, tags=made.tags, model_id=made.model_id)
        shop.ask("5")
        client.delete_model_version(shop.name, "2")
    shop.roll_back()
    assert shop.aliases() == {"champion": "4", "previous_champion": "1"}
    assert shop.audit()["faults"] == []


@pytest.mark.parametrize("gone", ["2", "4"])
def test_behind_a_deleted_version_there_is_a_way_back(shop, gone):
    """MLflow takes the aliases away with the version."""
    for version in ("1", "2", "4"):
        shop.ask(version)
    with registry(shop.root) as client:
        client.delete_model_version(shop.name, gone)
    if gone == "4":
        shop.ask("3")
        assert shop.aliases() == {"champion": "3", "previous_champion": "2"}
    assert shop.audit()["faults"] == []
    assert shop.roll_back().decision.version == {"2": "1", "4": "2"}[gone]
    assert shop.audit()["faults"] == []


def test_no_store_is_wrong_input(tmp_path):
    with pytest.raises(ConfigError, match="there is no tracking store"):
        promote(Wanted(name=shop.name, version="1"), root=tmp_path)
    assert not list(tmp_path.iterdir())

"""Aliases move one at a time, and what was decided stays known: on the embedded store, with real processes racing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tsp.errors import PromotionError
from tsp.policy import Verdict
from tsp.tracking import lock
from tsp.tracking.lock import locked
from tsp.tracking.note import note_for
from tsp.tracking.promotion import (
    Decision,
    decisions,
    experiment_of,
    holder,
    line_of_holders,
    move,
    recorded,
)
from tsp.tracking.store import open_store, resolve_uri

HOLDER = """
import time
from pathlib import Path
from mlflow import MlflowClient
from tsp.tracking.lock import locked
from tsp.tracking.store import resolve_uri
with locked(MlflowClient(resolve_uri(Path.cwd())), "pruned"):
    print("held", flush=True)
    time.sleep(60)
"""
RACER = """
import sys, time
from pathlib import Path
from mlflow import MlflowClient
from tsp.tracking.lock import locked
from tsp.tracking.store import resolve_uri
client, log = MlflowClient(resolve_uri(Path.cwd())), Path("race.log")
for _ in range(5):
    with locked(client, "pruned"):
        with log.open("a") as file:
            file.write("in\\n")
        time.sleep(0.02)
        with log.open("a") as file:
            file.write("out\\n")
"""


@pytest.fixture
def client(tmp_path):
    """Of a store with three versions of one model, without files."""
    from mlflow import MlflowClient

    uri = resolve_uri(tmp_path)
    open_store(uri, tmp_path)
    client = MlflowClient(uri)
    client.create_registered_model("pruned")
    for number in range(3):
        client.create_model_version("pruned", source=str(tmp_path / f"{number}"))
    return client


def decision(version: str, previous: str | None = None, **changes) -> Decision:
    given = {"kind": "promotion", "model": "pruned", "alias": "champion", "behind": previous}
    return Decision(**(given | {"version": version, "previous": previous} | changes))


def aliases(client) -> dict[str, str]:
    # A sqlite store gives them as whole numbers.
    return {alias: str(version) for alias, version in client.get_registered_model("pruned").aliases.items()}


def carry_out(client, one: Decision) -> str:
    with locked(client, "pruned"), recorded(client, one) as run_id:
        move(client, one)
    return run_id


def test_an_alias_moves_and_the_one_before_is_found(client):
    assert holder(client, "pruned", "champion") is None
    carry_out(client, decision("1"))
    assert aliases(client) == {"champion": "1"}
    carry_out(client, decision("3", "1"))
    assert aliases(client) == {"champion": "3", "previous_champion": "1"}
    carry_out(client, decision("1", "3", kind="rollback", behind=None))
    assert aliases(client) == {"champion": "1"}


def test_rollbacks_go_back_turn_by_turn_where_a_version_had_two(client):
    for version, previous in [("1", None), ("2", "1"), ("1", "2"), ("3", "1")]:
        carry_out(client, decision(version, previous))
    assert line_of_holders(decisions(client, "pruned"), "champion") == ["1", "2", "1", "3"]
    carry_out(client, decision("1", "3", kind="rollback", behind="2"))
    assert line_of_holders(decisions(client, "pruned"), "champion") == ["1", "2", "1"]
    carry_out(client, decision("2", "1", kind="rollback", behind="1"))
    assert line_of_holders(decisions(client, "pruned"), "champion") == ["1", "2"]


def test_a_decision_is_a_run_with_its_requirements(client, tmp_path):
    verdicts = (
        Verdict(requirement="ppl_ratio<=1.1", name="ppl_ratio", measured=1.05, verdict="kept"),
        Verdict(requirement="kl<=1", name="kl", measured=None, verdict="missing", note="measure it"),
    )
    run_id = carry_out(client, decision("2", reason="smaller", policy="p.yaml 0123", verdicts=verdicts))
    run = client.get_run(run_id)
    assert client.get_experiment(run.info.experiment_id).name == experiment_of("pruned") == "pruned/promotions"
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "champion: none -> 2 accepted"
    assert run.data.metrics == {"ppl_ratio": 1.05}
    table = json.loads(Path(client.download_artifacts(run_id, "requirements.json", str(tmp_path))).read_text())
    assert table["columns"] == ["requirement", "measured", "verdict", "note"]
    assert table["data"] == [["ppl_ratio<=1.1", "1.05", "kept", ""], ["kl<=1", "", "missing", "measure it"]]
    assert client.get_model_version("pruned", "2").tags == {"promotion.champion": f"accepted {run_id}"}
    (found,) = decisions(client, "pruned")
    assert (found.run_id, found.version, found.outcome, found.carried_out) == (run_id, "2", "accepted", True)
    assert (found.reason, found.policy, found.who) == ("smaller", "p.yaml 0123", run.data.tags["who"])


def test_a_refusal_is_recorded_and_moves_nothing(client):
    with recorded(client, decision("2", refusal="kl was not measured")):
        pass
    (found,) = decisions(client, "pruned")
    assert (found.outcome, found.refusal) == ("refused", "kl was not measured")
    assert aliases(client) == {}


def test_decisions_come_in_their_order_and_of_one_model_only(client):
    client.create_registered_model("other")
    client.create_model_version("other", source="x")
    for version, previous in (("1", None), ("2", "1"), ("3", "2")):
        carry_out(client, decision(version, previous))
    with recorded(client, decision("1", model="other")):
        pass
    assert [one.version for one in decisions(client, "pruned")] == ["1", "2", "3"]
    assert decisions(client, "none") == []


def test_an_interrupted_decision_shows(client):
    with pytest.raises(KeyboardInterrupt), recorded(client, decision("2")):
        raise KeyboardInterrupt
    (found,) = decisions(client, "pruned")
    assert not found.carried_out
    assert client.get_model_version("pruned", "2").tags == {}


def test_somebody_who_moves_the_alias_by_hand_is_noticed(client, monkeypatch):
    given = client.set_registered_model_alias

    def meddled(name, alias, version):
        given(name, alias, "3" if alias == "champion" else version)

    monkeypatch.setattr(client, "set_registered_model_alias", meddled)
    with pytest.raises(PromotionError, match="is version 3 a moment later"):
        carry_out(client, decision("2"))
    assert not decisions(client, "pruned")[0].carried_out


def test_the_lock_is_given_back_and_waited_for(client, monkeypatch):
    monkeypatch.setattr(lock, "_LOCK_WAIT_S", 0.5)
    with locked(client, "pruned"):
        with pytest.raises(PromotionError, match=r"@.*, process \d+ decides about pruned at this moment"):
            locked(client, "pruned").__enter__()
        with locked(client, "other"):
            pass
    with pytest.raises(ZeroDivisionError), locked(client, "pruned"):
        raise ZeroDivisionError
    with locked(client, "pruned"):
        pass
    assert [model.name for model in client.search_registered_models()] == ["pruned"]


def test_a_lock_that_was_left_behind_is_taken_away(client, monkeypatch):
    locked(client, "pruned").__enter__()
    monkeypatch.setattr(lock, "_LOCK_STALE_S", 0.0)
    time.sleep(0.01)
    with locked(client, "pruned"):
        pass
    assert [model.name for model in client.search_registered_models()] == ["pruned"]


def test_the_lock_of_a_killed_process_is_waited_for(client, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_LOCK_STALE_S", 5.0)
    monkeypatch.setattr(lock, "_TELL_AFTER_S", 0.0)
    with subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "held\n"
        killed.kill()
    with locked(client, "pruned"):
        pass
    assert f"process {killed.pid} decides about pruned at this moment, or was killed while it did" in caplog.text
    assert "is taken away" in caplog.text
    assert [model.name for model in client.search_registered_models()] == ["pruned"]


@pytest.mark.parametrize("clock", [-3600, 3600])
def test_a_lock_is_held_whatever_the_clock_of_who_waits_says(client, monkeypatch, clock):
    real = time.time
    monkeypatch.setattr(lock, "_LOCK_WAIT_S", 0.5)
    with locked(client, "pruned"):
        monkeypatch.setattr(time, "time", lambda: real() + clock)
        with pytest.raises(PromotionError, match="decides about pruned"):
            locked(client, "pruned").__enter__()


def test_who_took_too_long_leaves_the_lock_of_the_next(client):
    slow = locked(client, "pruned")
    still_ours = slow.__enter__()
    client.delete_registered_model("pruned.lock")
    with locked(client, "pruned"):
        with pytest.raises(PromotionError, match="decide again"):
            still_ours()
        slow.__exit__(None, None, None)
        assert "pruned.lock" in [model.name for model in client.search_registered_models()]


def test_decisions_come_in_their_order_whatever_the_clocks_say(client, monkeypatch):
    real = time.time
    for number, (version, previous) in enumerate((("1", None), ("2", "1"), ("3", "2"))):
        monkeypatch.setattr(time, "time", lambda number=number: real() - 60 * number)
        carry_out(client, decision(version, previous))
    assert [one.version for one in decisions(client, "pruned")] == ["1", "2", "3"]
    times = [one.time_ms for one in decisions(client, "pruned")]
    assert times == sorted(times, reverse=True), "the second and third had clocks that are slow"


def test_numbers_of_decisions_go_on_where_some_were_deleted(client):
    for version, previous in (("1", None), ("2", "1"), ("3", "2")):
        carry_out(client, decision(version, previous))
    for one in decisions(client, "pruned")[:2]:
        client.delete_run(one.run_id)
    carry_out(client, decision("2", "3"))
    assert [(one.number, one.version) for one in decisions(client, "pruned")] == [(3, "3"), (4, "2")]


def test_a_lock_whose_answer_was_lost_is_ours(client, monkeypatch):
    create = client.create_registered_model

    def repeated(*args, **kwargs):
        create(*args, **kwargs)
        return create(*args, **kwargs)

    monkeypatch.setattr(client, "create_registered_model", repeated)
    started = time.monotonic()
    with locked(client, "pruned") as still_ours:
        still_ours()
    assert time.monotonic() - started < 30


def test_only_one_process_is_inside(client, tmp_path):
    racers = [subprocess.Popen([sys.executable, "-c", RACER], cwd=tmp_path) for _ in range(3)]
    assert [racer.wait(timeout=120) for racer in racers] == [0, 0, 0]
    assert (tmp_path / "race.log").read_text().split() == ["in", "out"] * 15


def test_a_decision_has_no_credentials_in_it(client):
    carry_out(client, decision("1", reason="see https://me:SECRETword@host/ticket"))
    [made] = decisions(client, "pruned")
    assert made.reason == "see https://***@host/ticket"
    written = client.download_artifacts(made.run_id, "decision.json")
    assert json.loads(Path(written).read_text())["reason"] == made.reason


def test_the_experiments_of_a_model_say_how_to_read_them():
    assert "One run is one decision about small**" in note_for("small/promotions")
    assert "One run is one look at small in use**" in note_for("small/monitoring")
    assert "measurement of a version of small**" in note_for("small/evaluations")
    assert note_for("small").startswith("**One run is one job**")

"""What a study remembers: the job's own settings first, and each trial of each launch."""

import pytest

from tests.models import job as config_of
from tsp.errors import ConfigError
from tsp.space import read_space
from tsp.study import KILLED, Study

pytest.importorskip("optuna")

SPACE = {
    "stage2.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "stage2.lora.rank": {"low": 2, "high": 9},
    "stage2.task": [{"lm": 1, "distill": 0}, {"lm": 0, "distill": 1}],
    "stage2.gates": ["off", "anneal"],
    "stage2.lambda2": {"low": 0.1, "high": 1.0, "if": {"stage2.gates": ["anneal"]}},
}


@pytest.fixture
def opened(tmp_path):
    """Opens the study as a launch does, one after another."""
    last = []

    def open_study(space=SPACE, **settings):
        for study in last:
            study.close()
        config = config_of(**settings)
        last[:] = [Study(tmp_path / "tune.db", "name", read_space(space, config), config)]
        return last[0]

    yield open_study
    for study in last:
        study.close()


def finished(study, losses):
    trials = []
    for loss in losses:
        trials.append(study.ask())
        study.end(trials[-1].number, "complete", loss=loss, seconds=1.0)
    return trials


def test_the_jobs_own_settings_come_first(opened):
    first, *others = finished(opened(), [1.0] * 8)
    assert (first.number, first.preset, first.settings) == (0, True, {})
    for trial in others:
        assert not trial.preset
        assert 1e-4 <= trial.settings["stage2.lr"] <= 1e-2
        assert trial.settings["stage2.lr"] == float(f"{trial.settings['stage2.lr']:.3g}")
        assert trial.settings["stage2.lora.rank"] in range(2, 10)
        assert trial.settings["stage2.task"] in SPACE["stage2.task"]
        assert ("stage2.lambda2" in trial.settings) == (trial.settings["stage2.gates"] == "anneal")
    assert {trial.settings["stage2.gates"] for trial in others} == {"off", "anneal"}


def test_own_settings_outside_of_the_space_come_first_too(opened):
    first, second = finished(opened({"stage2.lr": {"low": 1.0, "high": 2.0}}), [1.0, 2.0])
    assert (first.settings, first.preset) == ({}, True)
    assert 1.0 <= second.settings["stage2.lr"] <= 2.0


def test_a_second_launch_goes_on(opened):
    first = finished(opened(), [3.0, 2.0])
    study = opened()
    assert [(trial.number, trial.loss, trial.settings) for trial in study.trials()] == [
        (trial.number, loss, trial.settings) for trial, loss in zip(first, [3.0, 2.0], strict=True)
    ]
    third = study.ask()
    assert (third.number, third.preset) == (2, False)
    assert third.settings["stage2.lr"] != first[1].settings["stage2.lr"], "not what the first launch drew"


def test_the_same_launch_asks_the_same(tmp_path):
    drawn = []
    for name in ("one", "two"):
        config = config_of(seed=3)
        study = Study(tmp_path / f"{name}.db", "name", read_space(SPACE, config), config)
        drawn.append([trial.settings for trial in finished(study, [3.0, 2.0, 1.0, 4.0, 5.0, 2.0, 3.0])])
        study.close()
    assert drawn[0] == drawn[1]


def test_a_killed_trial_is_failed_and_the_own_settings_are_tried_again(opened):
    opened().ask()
    study = opened()
    [killed] = study.trials()
    assert (killed.state, killed.reason) == ("failed", KILLED)
    again = study.ask()
    assert (again.number, again.preset) == (1, True)


def test_how_a_trial_ended_is_kept(opened):
    study = opened()
    for state, loss, reason in (
        ("complete", 2.5, None),
        ("pruned", None, "behind"),
        ("failed", None, "ModelError: no"),
    ):
        number = study.ask().number
        study.tracked(number, f"run-{number}")
        study.end(number, state, loss=loss, seconds=4.0, reason=reason)
    study.keep({"dense": 1.0})
    study = opened()
    assert [(trial.state, trial.loss, trial.reason, trial.run_id, trial.seconds) for trial in study.trials()] == [
        ("complete", 2.5, None, "run-0", 4.0),
        ("pruned", None, "behind", "run-1", 4.0),
        ("failed", None, "ModelError: no", "run-2", 4.0),
    ]
    assert study.losses() == {"dense": 1.0}


def test_a_trial_is_hopeless_when_it_is_behind_the_median_of_three(opened):
    study = opened()
    for at_step_4 in (3.0, 2.0, 4.0):
        number = study.ask().number
        assert not study.is_hopeless(number, 4, at_step_4), "there is too little to compare with"
        study.end(number, "complete", loss=1.0, seconds=1.0)
    number = study.ask().number
    assert [study.is_hopeless(number, *mark) for mark in ((3, 9.0), (4, 3.1))] == [False, True]
    study.end(number, "pruned", seconds=1.0)
    number = study.ask().number
    assert not study.is_hopeless(number, 4, 2.9)
    assert not study.is_hopeless(number, 5, 9.0), "nobody else was measured at step 5"


def test_the_same_search_does_not_run_twice_at_once(opened, tmp_path):
    opened()
    config = config_of()
    with pytest.raises(ConfigError, match="the same search runs already"):
        Study(tmp_path / "tune.db", "name", read_space(SPACE, config), config)

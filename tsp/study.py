"""The study behind `tsp tune`, in a sqlite file: **the only Optuna**; rank 0 alone holds one.

    study = Study(path, "0123abcd", knobs, config)
    trial = study.ask()                     # the job's own settings first
    if study.is_hopeless(trial, step, loss): study.end(trial, "pruned", ...)
    study.end(trial, "complete", loss=2.5)

A study of the same name goes on where it was left. What a trial does is not known here.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from tsp.config import JobConfig, flatten
from tsp.errors import ConfigError
from tsp.space import Knob, readable

State = Literal["complete", "pruned", "failed", "running"]

KILLED = "killed"
"""The reason of a trial whose launch ended before it did."""
_RANDOM_TRIALS = 4
"""Before the sampler begins to learn from what it saw."""
_COMPARED_WITH = 3
"""Trials that have to be complete before one is stopped for being worse."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial as the study has it."""

    number: int
    preset: bool
    """The job as it is given."""
    settings: dict[str, Any]
    """What differs from the job, by dotted key."""
    state: State
    loss: float | None
    """On tuning text, nats per token; None: it did not come to its end."""
    seconds: float | None
    run_id: str | None
    reason: str | None
    """Why it was stopped or failed."""


def require_optuna() -> None:
    """Raise ConfigError where the extra is missing, before anything is started."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ConfigError("tsp tune needs Optuna: pip install 'tsp[tune]'") from None


class Study:
    """Open it once per launch; a trial that an earlier launch did not end is failed."""

    def __init__(self, path: Path, name: str, knobs: Sequence[Knob], config: JobConfig) -> None:
        """Open or make the study, and put the job's own settings first unless they are done.

        Args:
            path: sqlite file.
            name: the same for the same search.
            knobs: what may be changed.
            config: the job; its seed is the sampler's.

        Raises:
            ConfigError: the same search runs already.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.{name}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"the same search runs already (it holds {self._lock.lock_file}); wait for it, or change --seed"
            ) from None
        self._knobs = knobs
        self._own = flatten(config.model_dump())
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 30}})
        self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        # With the seed alone a second launch would draw what the first one drew.
        seed = config.seed + len(self._study.trials)
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)
        self._asked: dict[int, Any] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING":
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if not any(
            trial.user_attrs.get("preset") and trial.state.name in ("COMPLETE", "WAITING")
            for trial in self._study.get_trials(deepcopy=False)
        ):
            own = {knob.key: _label(self._own[knob.key]) for knob in self._held() if knob.key in self._own}
            self._study.enqueue_trial(own, user_attrs={"preset": True})

    def close(self) -> None:
        """Let another launch have it."""
        self._lock.release()

    def ask(self) -> Trial:
        """What to try next; the job's own settings first, so that the result is never worse than they are."""
        trial = self._study.ask()
        preset = bool(trial.user_attrs.get("preset"))
        # The sampler learns from the job's own settings too, where they lie in the space.
        settings: dict[str, Any] = {}
        for knob in self._held() if preset else self._knobs:
            if knob.applies(self._own | settings):
                settings[knob.key] = _suggest(trial, knob)
        settings = {} if preset else settings
        trial.set_user_attr("settings", settings)
        self._asked[trial.number] = trial
        return next(found for found in self.trials() if found.number == trial.number)

    def tracked(self, number: int, run_id: str) -> None:
        """Say which run a trial is."""
        self._asked[number].set_user_attr("run_id", run_id)

    def is_hopeless(self, number: int, step: int, loss: float) -> bool:
        """Keep what a trial has reached, and say whether it is behind the median of the complete ones at that step.

        Optuna's own rule looks at the best of a trial's losses so far; an easy batch would save any trial.

        Args:
            number: of the trial.
            step: of its training.
            loss: that can be compared between trials at the same step.
        """
        self._asked[number].report(loss, step)
        done = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
        others = [trial.intermediate_values[step] for trial in done if step in trial.intermediate_values]
        return len(others) >= _COMPARED_WITH and loss > statistics.median(others)

    def end(
        self,
        number: int,
        state: State,
        *,
        loss: float | None = None,
        seconds: float,
        reason: str | None = None,
    ) -> None:
        """Say how a trial ended."""
        from optuna.trial import TrialState

        trial = self._asked.pop(number)
        trial.set_user_attr("seconds", round(seconds, 2))
        trial.set_user_attr("reason", reason)
        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        self._study.tell(trial, loss if state == "complete" else None, state=states[state])

    def keep(self, losses: Mapping[str, float]) -> None:
        """Keep losses that belong to no trial."""
        self._study.set_user_attr("losses", dict(losses))

    def losses(self) -> dict[str, float]:
        """What was kept."""
        return dict(self._study.user_attrs.get("losses", {}))

    def trials(self) -> list[Trial]:
        """All that were begun, the first one first."""
        return [_trial(trial) for trial in self._study.get_trials(deepcopy=False) if trial.state.name != "WAITING"]

    def _held(self) -> list[Knob]:
        """The knobs whose range holds the job's own setting, where it has an effect."""
        return [
            knob for knob in self._knobs if knob.applies(self._own) and knob.holds(self._own.get(knob.key, _MISSING))
        ]


_MISSING = object()
_STATES: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


def _trial(trial: Any) -> Trial:
    attrs, state = trial.user_attrs, _STATES[trial.state.name]
    return Trial(
        number=trial.number,
        preset=bool(attrs.get("preset")),
        settings=dict(attrs.get("settings", {})),
        state=state,
        loss=trial.value if state == "complete" else None,
        seconds=attrs.get("seconds"),
        run_id=attrs.get("run_id"),
        reason=attrs.get("reason", KILLED if state == "failed" else None),
    )


def _suggest(trial: Any, knob: Knob) -> Any:
    if knob.choices:
        labels = [_label(choice) for choice in knob.choices]
        return knob.choices[labels.index(trial.suggest_categorical(knob.key, labels))]
    if knob.whole:
        return trial.suggest_int(knob.key, knob.low, knob.high, log=knob.log)
    value = readable(trial.suggest_float(knob.key, knob.low, knob.high, log=knob.log))
    return min(max(value, knob.low), knob.high)


def _label(choice: Any) -> Any:
    """Optuna takes choices that are plain values; others are shown as JSON."""
    return choice if isinstance(choice, str | int | float | bool | None) else json.dumps(choice)

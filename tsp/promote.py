"""Whether a version may have an alias, from what was measured of it and of the version that has it now.

    wanted = Wanted(name="demo-pruned", version="2", requirements=(read_requirement("ppl_ratio<=1.1"),))
    outcome = promote(wanted, root=Path.cwd())          # outcome.decision.refusal is empty: the alias has moved

A refusal is recorded like a promotion. Nothing is measured here but the hashes of the files, unless `measure` asks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tsp.errors import ConfigError, ModelError
from tsp.evidence import Measured, how_to_measure, measured_of, relative_to
from tsp.policy import Policy, Requirement, Verdict, check_alias, check_model_name, judge, read_requirement, required_of
from tsp.tracking.lock import locked
from tsp.tracking.manifest import file_faults
from tsp.tracking.promotion import (
    PREVIOUS,
    Decision,
    before_last,
    begun_rollback,
    decisions,
    holder,
    line_of_holders,
    move,
    recorded,
    up_to,
)
from tsp.tracking.versions import evidence_of, find_version, registry, versions_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DEFAULT = ("round_trip==ok",)
"""Required where nobody says what is."""
_FILES = "files==ok"
"""Always required of versions whose hashes are known."""
_CHAMPION = "champion"
NOBODY = "none"
"""`--expect-champion none`: the alias is not given yet."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What somebody asks for."""

    name: str
    version: str
    """Its number, or an alias that leads to it."""
    alias: str = _CHAMPION
    requirements: tuple[Requirement, ...] = ()
    """Beside those of the policy."""
    policy: Policy | None = None
    expected: str | None = None
    """The version that the user believes to have the alias, or `none`; None: not said."""
    reason: str = ""
    dry_run: bool = False
    """Only judge: no decision is recorded, nothing moves."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it."""

    decision: Decision
    run_id: str | None
    """Of the decision; None: nothing was recorded."""
    unchanged: bool = False
    """The version has the alias already."""


Measure = Callable[["MlflowClient", "ModelVersion", "ModelVersion | None"], None]
"""Records new evidence of a candidate and of the version that has the alias now; `remeasure.remeasure`."""


def promote(wanted: Wanted, *, root: Path, measure: Measure | None = None) -> Outcome:
    """Judge, record, and move the alias if all requirements are kept.

    Args:
        wanted: what is asked for.
        root: working directory of the jobs.
        measure: makes evidence first; None: what there is has to do.

    Raises:
        ConfigError: an alias that cannot be one, or a policy that does not know it.
        ModelError: no such model or version, or its files are gone.
        PromotionError: somebody moved the alias without tsp while it was moved.
        TrackingError: the store cannot be used.
    """
    _check_words(wanted.name, wanted.alias, wanted.expected)
    required = required_of(wanted.policy, wanted.alias) if wanted.policy else ()
    required = (*required, *wanted.requirements) or tuple(map(read_requirement, DEFAULT))
    with registry(root) as client:
        candidate = find_version(client, wanted.name, wanted.version)
        champion, version = holder(client, wanted.name, wanted.alias), str(candidate.version)
        line = line_of_holders(decisions(client, wanted.name), wanted.alias)
        decision = Decision(
            kind="promotion",
            model=wanted.name,
            version=version,
            alias=wanted.alias,
            previous=champion,
            # Who has it may have got it without us, and who had it may be deleted.
            behind=before_last([*line, *filter(None, [champion]), version], _there(client, wanted.name)),
            reason=wanted.reason,
            policy=f"{wanted.policy.source} {wanted.policy.hash}" if wanted.policy else "",
        )
        # On the way to it, in `shadow` say, a version is compared with the champion, too.
        rival = holder(client, wanted.name, _CHAMPION) or champion
        if champion == version:
            if line[-1:] == [version]:
                return Outcome(decision=decision, run_id=None, unchanged=True)
            # An interrupted promotion had moved it, or somebody without us: this settles it.
            wanted, rival = _as_begun(wanted, line), decision.behind
        files = _files(client, candidate)
        against = None if rival in (None, version) else find_version(client, wanted.name, rival)
        if measure is not None:
            measure(client, candidate, against)
        decision = _judged(client, decision, against, required, files)
        return _decided(client, decision, wanted)


def _as_begun(wanted: Wanted, line: Sequence[str]) -> Wanted:
    """Of a command that had moved the alias and is given again: whom it expected was right then."""
    began_with = line[-1] if line else NOBODY
    return replace(wanted, expected=None) if wanted.expected == began_with else wanted


def _check_words(name: str, alias: str, expected: str | None) -> None:
    check_model_name(name)
    check_alias(alias)
    if expected not in (None, "none") and not expected.isdecimal():
        raise ConfigError(f"--expect-champion must be the number of a version, or none, got {expected!r}")


def roll_back(name: str, *, alias: str, reason: str, expected: str | None, dry_run: bool, root: Path) -> Outcome:
    """Give an alias back to the version that had it before; recorded like a promotion.

    The history says which that is; where it knows of none, `previous_ALIAS` does.

    Raises:
        ModelError: nobody had it before, or that version's files are gone.
        ConfigError, PromotionError, TrackingError: as `promote`.
    """
    _check_words(name, alias, expected)
    with registry(root) as client:
        now, history = holder(client, name, alias), decisions(client, name)
        line = line_of_holders(history, alias)
        there = _there(client, name)
        settles = now is not None and now == begun_rollback(history, alias)
        before = now if settles else before_last([*line, now], there) if now else None
        before = before or holder(client, name, f"{PREVIOUS}{alias}")
        if now is None or before is None or (before == now and not settles):
            has = f"version {now} has it now" if now else "none has it now"
            raise ModelError(f"no version had {name}@{alias} before ({has}); `tsp audit {name}` shows the history")
        target = find_version(client, name, before)
        decision = Decision(
            kind="rollback",
            model=name,
            version=before,
            alias=alias,
            previous=now,
            behind=before_last(up_to(line, before), there),
            reason=reason,
        )
        decision = _judged(client, decision, None, (), _files(client, target))
        wanted = Wanted(name=name, version=before, alias=alias, expected=expected, dry_run=dry_run)
        return _decided(client, decision, _as_begun(wanted, line) if settles else wanted)


def _there(client: "MlflowClient", name: str) -> set[str]:
    """The versions that are not deleted."""
    return {str(version.version) for version in versions_of(client, name)}


def _files(client: "MlflowClient", version: "ModelVersion") -> list[str] | None:
    """Files that changed since registration; None: nobody knows.

    Raises:
        ModelError: some are gone.
    """
    faults = file_faults(client, version)
    gone = [fault for fault in faults or [] if fault.endswith("gone")]
    if gone:
        raise ModelError(
            f"version {version.version} of {version.name} has lost its files: {'; '.join(gone[:3])}; register it again "
            f"from its job's checkpoint, or delete the version"
        )
    return faults


def _judged(
    client: "MlflowClient",
    decision: Decision,
    against: "ModelVersion | None",
    required: tuple[Requirement, ...],
    files: list[str] | None,
) -> Decision:
    """The decision with its verdicts and evidence, refused where one is not kept."""
    ours = evidence_of(client, find_version(client, decision.model, decision.version))
    measured: Measured = {}
    for one in ours:
        measured |= measured_of(one.document)
    evidence = [one.run_id for one in ours]
    if against is not None:
        theirs = evidence_of(client, against)
        for one in ours:
            for other in theirs:
                measured |= relative_to(other.document, one.document)
        evidence += [other.run_id for other in theirs]
    if files is not None:
        measured["files"] = "; ".join(files) or "ok"
        required = (*required, read_requirement(_FILES))
    call = f"tsp promote {decision.model} {decision.version} --alias {decision.alias}"
    verdicts = judge(
        required,
        measured,
        first=against is None,
        how_to_measure=lambda name: how_to_measure(name, measured, call),
    )
    refusal = "; ".join(_in_words(verdict) for verdict in verdicts if not verdict.passes)
    return replace(decision, verdicts=tuple(verdicts), evidence=tuple(evidence), refusal=refusal)


def _in_words(verdict: Verdict) -> str:
    if verdict.verdict == "missing":
        return f"{verdict.requirement} is not measured: {verdict.note}"
    value = verdict.measured if isinstance(verdict.measured, str) else f"{verdict.measured:.6g}"
    return f"{verdict.requirement} is broken: {value}"


def _decided(client: "MlflowClient", decision: Decision, wanted: Wanted) -> Outcome:
    """Record the decision, and carry it out if it was accepted and nobody was faster."""
    if wanted.dry_run:
        return Outcome(decision=_unless_moved(decision, decision.previous, wanted), run_id=None)
    with locked(client, decision.model) as still_ours:
        decision = _unless_moved(decision, holder(client, decision.model, decision.alias), wanted)
        with recorded(client, decision) as run_id:
            if not decision.refusal:
                still_ours()
                move(client, decision)
    return Outcome(decision=decision, run_id=run_id)


def _unless_moved(decision: Decision, now: str | None, wanted: Wanted) -> Decision:
    """Refused where the alias is not with whom it was judged against, or with whom the user expects."""
    found = now or NOBODY
    if wanted.expected is not None and wanted.expected != found:
        words = f"version {now} has {decision.alias}" if now else f"no version has {decision.alias}"
        return replace(decision, refusal=f"{words}, --expect-champion said {wanted.expected}")
    if now != decision.previous:
        return replace(
            decision,
            previous=now,
            behind=now,
            refusal=f"{decision.alias} went from version {decision.previous or NOBODY} to {found} in the meantime: "
            "decide again",
        )
    return decision

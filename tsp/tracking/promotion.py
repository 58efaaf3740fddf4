"""Aliases of a registered model move by decision, one at a time, and each decision is a run in `NAME/promotions`.

    with locked(client, "demo-pruned"):
        decision = Decision(model="demo-pruned", version="4", alias="champion", previous="3", ...)
        with recorded(client, decision):
            move(client, decision)

MLflow sets an alias whoever asks, last writer wins, and forgets who had it before. What is asked for before one may
move is not known here.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tsp.errors import PromotionError
from tsp.masking import masked_tree
from tsp.policy import Verdict
from tsp.tracking.pages import search_pages
from tsp.tracking.results import KIND_TAG
from tsp.tracking.spool import now_ms
from tsp.tracking.store import ensure_experiment
from tsp.tracking.who import who

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

PREVIOUS = "previous_"
"""Before an alias: the version that had it before."""
DECISION_KIND = "decision"
ACCEPTED = "accepted"
DECISION_FILE = "decision.json"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided about one alias, by whom and why."""

    kind: Literal["promotion", "rollback"]
    model: str
    version: str
    alias: str
    previous: str | None
    """The version that has the alias; None: none has."""
    behind: str | None
    """The version that `previous_ALIAS` is to lead to afterwards; None: none."""
    refusal: str = ""
    """Why it was refused, in a sentence; empty: it was accepted."""
    reason: str = ""
    """As the user gave it."""
    verdicts: tuple[Verdict, ...] = ()
    policy: str = ""
    """File and hash of the policy; empty: the requirements came with the command."""
    evidence: tuple[str, ...] = ()
    """Runs that measured what was judged."""
    who: str = field(default_factory=who)

    @property
    def outcome(self) -> str:
        """In a word."""
        return "refused" if self.refusal else ACCEPTED


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A decision as the store has it."""

    run_id: str
    number: int
    """Counts up; 0: of an earlier release, which gave none."""
    time_ms: int
    carried_out: bool
    """False: whoever decided it was interrupted before the alias had moved for certain."""
    kind: str
    version: str
    alias: str
    previous: str
    """Empty: none."""
    outcome: str
    who: str
    reason: str
    refusal: str
    policy: str


def experiment_of(name: str) -> str:
    """The experiment of a model's decisions."""
    return f"{name}/promotions"


def holder(client: "MlflowClient", name: str, alias: str) -> str | None:
    """The version that has an alias now; None: none has."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


def move(client: "MlflowClient", decision: Decision) -> None:
    """Give the alias to the version; first, what had it is made to be found under `previous_ALIAS`.

    Raises:
        PromotionError: somebody moved it without tsp at the same moment.
    """
    name, alias = decision.model, decision.alias
    if decision.behind is None:
        client.delete_registered_model_alias(name, f"{PREVIOUS}{alias}")
    else:
        client.set_registered_model_alias(name, f"{PREVIOUS}{alias}", decision.behind)
    client.set_registered_model_alias(name, alias, decision.version)
    found = holder(client, name, alias)
    if found != decision.version:
        raise PromotionError(
            f"{name}@{alias} was given to version {decision.version} and is version {found} a moment later: somebody "
            f"moved it without tsp; look with `tsp audit {name}`, then decide again"
        )


@contextmanager
def recorded(client: "MlflowClient", decision: Decision) -> Iterator[str]:
    """Write a decision down as a run; it stays open while the block carries it out, so that a half-done one shows.

    Under the lock, so that decisions can be numbered: a run's times are those of the clock of whoever decided.

    Yields:
        The run's id.
    """
    tags = {
        KIND_TAG: DECISION_KIND,
        "kind": decision.kind,
        "model": decision.model,
        "version": decision.version,
        "alias": decision.alias,
        "previous": decision.previous or "",
        "decision": decision.outcome,
        "who": decision.who,
        "reason": decision.reason,
        "refusal": decision.refusal,
        "policy": decision.policy,
        "evidence": ",".join(decision.evidence),
        "number": str(max((one.number for one in decisions(client, decision.model)), default=0) + 1),
    }
    title = f"{decision.alias}: {decision.previous or 'none'} -> {decision.version} {decision.outcome}"
    experiment_id = ensure_experiment(client, experiment_of(decision.model))
    run_id = client.create_run(experiment_id, run_name=title, tags=masked_tree(tags)).info.run_id
    try:
        client.log_dict(run_id, masked_tree(asdict(decision) | {"outcome": decision.outcome}), DECISION_FILE)
        if decision.verdicts:
            client.log_table(run_id, requirement_table(decision.verdicts), "requirements.json")
        client.log_batch(run_id, metrics=_metrics(decision.verdicts))
        yield run_id
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_model_version_tag(
        decision.model, decision.version, f"promotion.{decision.alias}", f"{decision.outcome} {run_id}"
    )
    client.set_terminated(run_id, "FINISHED")


def _metrics(verdicts: Iterable[Verdict]) -> "list[Metric]":
    from mlflow.entities import Metric

    values = {verdict.name: verdict.measured for verdict in verdicts if isinstance(verdict.measured, float | int)}
    return [Metric(name, value, now_ms(), 0) for name, value in values.items()]


def decisions(client: "MlflowClient", name: str) -> list[Recorded]:
    """All decisions about a model, the oldest first."""
    experiment = client.get_experiment_by_name(experiment_of(name))
    if experiment is None:
        return []
    condition = f"tags.`{KIND_TAG}` = '{DECISION_KIND}'"
    runs = search_pages(client.search_runs, [experiment.experiment_id], condition, order_by=["start_time ASC"])
    # Of those that an earlier release has recorded only the time is known.
    return sorted(map(_as_recorded, runs), key=lambda one: one.number)


def line_of_holders(history: Iterable[Recorded], alias: str) -> list[str]:
    """The versions that had an alias, so that each rollback goes one back; the last has it, by what was decided."""
    line: list[str] = []
    for one in history:
        if one.alias != alias or one.outcome != ACCEPTED or not one.carried_out:
            continue
        if one.kind == "promotion":
            # Who had it before may have got it without us.
            line += [number for number in (one.previous,) if number and line[-1:] != [number]]
            line += [one.version] if line[-1:] != [one.version] else []
        else:
            line = up_to(line, one.version) or [one.version]
    return line


def up_to(line: Sequence[str], version: str) -> list[str]:
    """The line until a version's last turn, it may have had more than one; empty: it had none."""
    turns = [number for number, held in enumerate(line, start=1) if held == version]
    return list(line[: turns[-1]]) if turns else []


def begun_rollback(history: Sequence[Recorded], alias: str) -> str | None:
    """Where the last accepted decision about an alias goes, if that is a rollback which was interrupted."""
    accepted = [one for one in history if one.alias == alias and one.outcome == ACCEPTED]
    last = accepted[-1] if accepted else None
    return last.version if last and last.kind == "rollback" and not last.carried_out else None


def before_last(line: Sequence[str], there: Collection[str]) -> str | None:
    """Of a `line_of_holders`, another version that had the alias before the last and is still there; None: none is.

    Args:
        line: the holders.
        there: the versions that are not deleted.
    """
    known = [number for number in line[:-1] if number in there and number != line[-1]]
    return known[-1] if known else None


def _as_recorded(run: "Run") -> Recorded:
    tags = run.data.tags
    names = ("kind", "version", "alias", "previous", "who", "reason", "refusal", "policy")
    return Recorded(
        run_id=run.info.run_id,
        number=int(tags.get("number", 0)),
        time_ms=run.info.start_time,
        carried_out=run.info.status == "FINISHED",
        outcome=tags.get("decision", ""),
        **{name: tags.get(name, "") for name in names},
    )


def requirement_table(rows: Sequence[Verdict]) -> dict[str, list[Any]]:
    """Verdicts by column, as MLflow's tables want them."""
    return {
        "requirement": [row.requirement for row in rows],
        "measured": ["" if row.measured is None else str(row.measured) for row in rows],
        "verdict": [row.verdict for row in rows],
        "note": [row.note for row in rows],
    }

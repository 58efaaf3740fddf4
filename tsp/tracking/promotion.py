"""Aliases of a registered model move by decision, one at a time, and each decision is a run in `NAME/promotions`.

    with locked(client, "demo-pruned"):
        decision = Decision(model="demo-pruned", version="4", alias="champion", previous="3", ...)
        with recorded(client, decision):
            move(client, decision)

MLflow sets an alias whoever asks, last writer wins, and forgets who had it before. What is asked for before one may
move is not known here.
"""

import getpass
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tsp.errors import PromotionError
from tsp.masking import masked_tree
from tsp.policy import Verdict
from tsp.tracking.results import KIND_TAG
from tsp.tracking.store import ensure_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("tsp")

PREVIOUS = "previous_"
"""Before an alias: the version that had it before."""
DECISION_KIND = "decision"
ACCEPTED = "accepted"
DECISION_FILE = "decision.json"

LOCK = ".lock"
_LOCK_STALE_S = 120.0
"""Nothing under the lock takes more than a few requests: whoever holds it for longer is dead."""
_LOCK_WAIT_S = _LOCK_STALE_S + 30
_LOCK_POLL_S = 0.2
_TELL_AFTER_S = 2.0


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
    who: str = field(default_factory=lambda: f"{getpass.getuser()}@{socket.gethostname()}")

    @property
    def outcome(self) -> str:
        """In a word."""
        return "refused" if self.refusal else ACCEPTED


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A decision as the store has it."""

    run_id: str
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


@contextmanager
def locked(client: "MlflowClient", name: str) -> Iterator[None]:
    """Only one process, on whatever machine, decides about a model inside the block.

    The lock is a registered model `NAME.lock`: its name is unique in the database, so that only one can create it, be
    the store a file, PostgreSQL or behind a server. One that a killed process has left behind is taken away when it is
    two minutes old; others wait for that.

    Raises:
        PromotionError: others hold it, for two minutes and a half.
    """
    lock, me = f"{name}{LOCK}", f"{getpass.getuser()}@{socket.gethostname()}, process {os.getpid()}"
    started, told = time.monotonic(), False
    while not _created(client, lock, me):
        waited_s = time.monotonic() - started
        if waited_s > _TELL_AFTER_S and not told:
            log.warning(
                "%s decides about %s at this moment, or was killed while it did; waiting for at most %.0f s",
                *(_lock_holder(client, lock), name, _LOCK_WAIT_S),
            )
            told = True
        if waited_s > _LOCK_WAIT_S:
            raise PromotionError(
                f"{_lock_holder(client, lock)} decides about {name} at this moment; try again in a minute"
            )
        time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        client.delete_registered_model(lock)


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
    }
    title = f"{decision.alias}: {decision.previous or 'none'} -> {decision.version} {decision.outcome}"
    experiment_id = ensure_experiment(client, experiment_of(decision.model))
    run_id = client.create_run(experiment_id, run_name=title, tags=masked_tree(tags)).info.run_id
    client.log_dict(run_id, masked_tree(asdict(decision) | {"outcome": decision.outcome}), DECISION_FILE)
    if decision.verdicts:
        client.log_table(run_id, requirement_table(decision.verdicts), "requirements.json")
    for verdict in decision.verdicts:
        if isinstance(verdict.measured, float | int):
            client.log_metric(run_id, verdict.name, verdict.measured)
    try:
        yield run_id
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_model_version_tag(
        decision.model, decision.version, f"promotion.{decision.alias}", f"{decision.outcome} {run_id}"
    )
    client.set_terminated(run_id, "FINISHED")


def decisions(client: "MlflowClient", name: str) -> list[Recorded]:
    """All decisions about a model, the oldest first."""
    experiment = client.get_experiment_by_name(experiment_of(name))
    if experiment is None:
        return []
    found: list[Recorded] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id],
            f"tags.`{KIND_TAG}` = '{DECISION_KIND}'",
            order_by=["start_time ASC"],
            page_token=token,
        )
        found += map(_as_recorded, page)
        token = page.token
        if not token:
            return found


def line_of_holders(history: Iterable[Recorded], alias: str) -> list[str]:
    """The versions that had an alias, so that each rollback goes one back; the last has it, by what was decided."""
    line: list[str] = []
    for one in history:
        if one.alias != alias or one.outcome != ACCEPTED or not one.carried_out:
            continue
        if one.kind == "promotion":
            # Who had it before may have got it without us.
            line += [one.previous] if one.previous and line[-1:] != [one.previous] else []
            line.append(one.version)
        else:
            # Its last turn: a version may have had it twice.
            turns = [number for number, version in enumerate(line, start=1) if version == one.version]
            line = line[: turns[-1]] if turns else [one.version]
    return line


def _as_recorded(run: "Run") -> Recorded:
    tags = run.data.tags
    names = ("kind", "version", "alias", "previous", "who", "reason", "refusal", "policy")
    return Recorded(
        run_id=run.info.run_id,
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


def _created(client: "MlflowClient", lock: str, me: str) -> bool:
    """Whether the lock is ours now."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(lock, tags={"holder": me}, description="Held while an alias moves.")
        return True
    except MlflowException as error:
        # mlflow 3.17 looks at the model that was there first, which may be gone by then.
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
    try:
        held_s = time.time() - client.get_registered_model(lock).creation_timestamp / 1000
        if held_s > _LOCK_STALE_S:
            log.warning("%s was left behind %.0f s ago and is taken away", lock, held_s)
            client.delete_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return False


def _lock_holder(client: "MlflowClient", lock: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_registered_model(lock).tags.get("holder", "somebody"))
    except MlflowException:
        return "somebody"

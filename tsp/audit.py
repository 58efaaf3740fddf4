"""Whether a registered model is as it was decided: aliases where decisions left them, files as they were registered.

document = audit("demo-pruned", root=Path.cwd(), alias=None, files=True)
sound = not document["faults"]
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsp.policy import check_alias
from tsp.tracking.manifest import file_faults
from tsp.tracking.promotion import ACCEPTED, PREVIOUS, Recorded, before_last, decisions, line_of_holders
from tsp.tracking.versions import registry, versions_of


def audit(name: str, *, root: Path, alias: str | None, files: bool) -> dict[str, Any]:
    """Hold the registry against the recorded decisions, and the files against their recorded hashes. Only reads.

    Args:
        name: registered model.
        root: working directory of the jobs.
        alias: the only one to look at; None: all.
        files: read all files of all versions, too.

    Returns:
        `{model, aliases, decisions, files, faults}`: which version has which alias, the history, by version `ok`, the
        faults, or `not recorded`, and a sentence for each thing that is not as it was decided.

    Raises:
        ModelError: no such model.
        TrackingError: the store cannot be used.
    """
    if alias is not None:
        check_alias(alias)
    with registry(root) as client:
        versions = versions_of(client, name)
        history = [one for one in decisions(client, name) if alias in (None, one.alias)]
        holders = {held: str(version.version) for version in versions for held in version.aliases}
        if alias is not None:
            holders = {held: number for held, number in holders.items() if held.removeprefix(PREVIOUS) == alias}
        checked = {str(version.version): file_faults(client, version) for version in versions} if files else {}
    there = {str(version.version) for version in versions}
    faults = [*_moved(holders, history, there), *_interrupted(history)]
    faults += [f"version {number}: {fault}" for number, found in checked.items() for fault in found or []]
    return {
        "model": name,
        "aliases": holders,
        "decisions": [asdict(one) for one in history],
        "files": {
            number: "not recorded" if found is None else "; ".join(found) or "ok" for number, found in checked.items()
        },
        "faults": faults,
    }


def _moved(holders: dict[str, str], history: Sequence[Recorded], there: Collection[str]) -> Iterator[str]:
    """Aliases that are not where the decisions left them."""
    decided: dict[str, str] = {}
    for alias in {one.alias for one in history}:
        line = line_of_holders(history, alias)
        decided |= {alias: line[-1]} if line else {}
        before, previous = before_last(line, there), f"{PREVIOUS}{alias}"
        # A version takes its aliases with it when it is deleted.
        went_with_it = previous not in holders and len(line) > 1 and line[-2] not in there
        decided |= {previous: before} if before and not went_with_it else {}
    for alias in sorted({*holders, *decided}):
        found, last = holders.get(alias), decided.get(alias)
        if found == last:
            continue
        if last is None:
            yield f"{alias} leads to version {found}, and no decision says so: somebody set it by hand"
        else:
            now = "is gone" if found is None else f"leads to version {found}"
            yield f"{alias} {now}, and the last decision says version {last}: somebody moved it by hand"


def _interrupted(history: Sequence[Recorded]) -> Iterator[str]:
    """Accepted decisions that were not carried out to the end, and after which nothing was decided."""
    for place, one in enumerate(history):
        later = history[place + 1 :]
        settled = any(other.alias == one.alias and other.outcome == ACCEPTED for other in later)
        if one.outcome == ACCEPTED and not one.carried_out and not settled:
            yield (
                f"{one.alias} was to go to version {one.version} (run {one.run_id}), and that was interrupted: "
                "decide again"
            )

"""The commands of the model registry: promote, roll back, audit."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsp.exits import exit_codes, stdout_kept_clean
from tsp.options import Command, slices_option, tasks_option

if TYPE_CHECKING:
    from tsp.promote import Outcome

_alias = click.option("--alias", default="champion", show_default=True, help="Name that leads to the version.")
_expected = click.option(
    "--expect-champion",
    metavar="N|none",
    help="Refuse unless this version has the alias now.",
)
_reason = click.option("--reason", default="", help="Why; recorded with the decision.")
_dry_run = click.option("--dry-run", is_flag=True, help="Only judge; what --evaluate measures is kept.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


@click.command(cls=Command)
@click.argument("name")
@click.argument("version")
@_alias
@click.option("--require", "required", multiple=True, metavar="EXPR", help="Like ppl_ratio<=1.10; repeatable.")
@click.option("--policy", type=click.Path(path_type=Path), help="YAML with a list of requirements for each alias.")
@_expected
@_reason
@click.option(
    "--evaluate", is_flag=True, help="Measure it first, and the version that has the alias, on the same text."
)
@click.option("--eval-data", multiple=True, help="With --evaluate: corpus to measure on; repeatable [as its job].")
@slices_option
@tasks_option
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="With --evaluate: dotted config key.")
@_dry_run
@_json
@_debug
def promote(name: str, version: str, **options: Any) -> None:
    """Give an alias to a version whose measurements keep all requirements; exit 3 where they do not.

    VERSION is a number or an alias. Without --require and --policy: round_trip==ok.
    """
    with exit_codes(debug=options["debug"]), stdout_kept_clean() as stdout:
        from tsp.policy import read_policy, read_requirement
        from tsp.promote import Wanted
        from tsp.promote import promote as decide

        wanted = Wanted(
            name=name,
            version=version,
            alias=options["alias"],
            requirements=tuple(map(read_requirement, options["required"])),
            policy=read_policy(options["policy"]) if options["policy"] else None,
            expected=options["expect_champion"],
            reason=options["reason"],
            dry_run=options["dry_run"],
        )
        outcome = decide(wanted, root=Path.cwd(), measure=_measure(options))
        _say(outcome, options, stdout)


@click.command(cls=Command)
@click.argument("name")
@_alias
@_expected
@_reason
@_dry_run
@_json
@_debug
def rollback(name: str, **options: Any) -> None:
    """Give an alias back to the version that had it before."""
    with exit_codes(debug=options["debug"]), stdout_kept_clean() as stdout:
        from tsp.promote import roll_back

        outcome = roll_back(
            name,
            alias=options["alias"],
            reason=options["reason"],
            expected=options["expect_champion"],
            dry_run=options["dry_run"],
            root=Path.cwd(),
        )
        _say(outcome, options, stdout)


@click.command(cls=Command)
@click.argument("name")
@click.option("--alias", help="Look at this one only [all].")
@click.option("--no-files", is_flag=True, help="Do not read the files to compare their hashes.")
@_json
@_debug
def audit(name: str, alias: str | None, no_files: bool, as_json: bool, debug: bool) -> None:
    """Print all decisions; exit 3 where an alias or a file is not as it was decided or registered."""
    with exit_codes(debug=debug), stdout_kept_clean() as stdout:
        from tsp.audit import audit as look
        from tsp.report_registry import print_audit

        document = look(name, root=Path.cwd(), alias=alias, files=not no_files)
        if as_json:
            print(json.dumps(document), file=stdout)
        else:
            print_audit(document, stdout)
    sys.exit(3 if document["faults"] else 0)


def _measure(options: dict[str, Any]) -> Any:
    """What measures before the decision; None: nothing does."""
    from functools import partial

    from tsp.config import nest, parse_override
    from tsp.errors import ConfigError

    given = {key: options[key] for key in ("eval_data", "slices", "tasks", "overrides") if options[key]}
    if not options["evaluate"]:
        if given:
            flag = "--" + next(iter(given)).replace("_", "-").replace("overrides", "set")
            raise ConfigError(f"{flag} says what --evaluate measures: give --evaluate, too")
        return None
    from tsp.remeasure import remeasure

    stated = [
        nest(key, list(value) if isinstance(value, tuple) else value)
        for key, value in (
            ("eval.sources", options["eval_data"]),
            ("eval.slices", options["slices"]),
            ("eval.tasks", options["tasks"]),
        )
        if value
    ]
    stated += map(parse_override, options["overrides"])
    return partial(remeasure, stated=stated, root=Path.cwd())


def _say(outcome: "Outcome", options: dict[str, Any], stdout: Any) -> None:
    from tsp.errors import PromotionError
    from tsp.report_registry import print_decision

    decision = outcome.decision
    document = asdict(decision) | {
        "outcome": decision.outcome,
        "run_id": outcome.run_id,
        "unchanged": outcome.unchanged,
        "dry_run": options["dry_run"],
    }
    if options["as_json"]:
        print(json.dumps(document), file=stdout)
    else:
        print_decision(document, stdout)
    if decision.refusal:
        raise PromotionError(f"version {decision.version} does not become {decision.alias}: {decision.refusal}")

"""What a benchmark prints: rows `{name, value, target, op, ok}`, as JSON for `run.py`, or as lines for a reader."""

import json
import operator
from typing import Any

_HOLDS = {"<=": operator.le, ">=": operator.ge}


def row(name: str, value: float, op: str, target: float) -> dict[str, Any]:
    """One result. The value is judged before it is rounded.

    Args:
        name: as it stands in `results.json`.
        value: measured.
        op: `<=` or `>=`.
        target: what it must reach.
    """
    return {"name": name, "value": float(f"{value:.4g}"), "target": target, "op": op, "ok": _HOLDS[op](value, target)}


def show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print them."""
    if as_json:
        print(json.dumps(rows))
        return
    for one in rows:
        judged = "ok" if one["ok"] else "MISSED"
        print(f"{one['name']:44} {one['value']:10g}  (target {one['op']} {one['target']:g}) {judged}")

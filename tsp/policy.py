"""What a promotion asks for: bounds on measured values, from words or a YAML file, and whether they are kept.

    requirements = [read_requirement("ppl_ratio<=1.10"), read_requirement("vs_champion.ppl_ratio<=1.01")]
    verdicts = judge(requirements, measured)

Pure: what is measured is a mapping from names to values (`tsp/evidence.py` makes it), and nothing is written here.
"""

import difflib
import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tsp.errors import ConfigError
from tsp.yaml12 import read_yaml

Value = float | str

VS_CHAMPION = "vs_champion."
"""Before the name of a value: relative to that of the version which holds the alias now."""
MONITOR = "monitor"
"""Key of a policy file beside the aliases: what `tsp monitor` asks for."""

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
# Behind a slash stands the name of a slice, a corpus or a task, and in those there may be spaces.
_NAME = re.compile(r"[A-Za-z_][\w.\-]*(?:/[\w.\-/ ]*[\w.\-/])?")
_OPERATOR = re.compile(r"<=|>=|==|<|>")
_BOUND = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A bound on one measured value."""

    name: str
    """As `evidence.measured_of` names it; with `vs_champion.` before it, relative to the champion's."""
    operator: str
    bound: Value

    def __str__(self) -> str:
        bound = self.bound if isinstance(self.bound, str) else f"{self.bound:g}"
        return f"{self.name}{self.operator}{bound}"

    def holds(self, value: Value) -> bool:
        """Whether a measured value keeps the bound; one that is no number never does."""
        if isinstance(value, str) or isinstance(self.bound, str):
            return self.operator == "==" and value == self.bound
        return math.isfinite(value) and _OPERATORS[self.operator](value, self.bound)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one requirement."""

    requirement: str
    name: str
    """Of the value."""
    measured: Value | None
    """None: nobody has measured it, or it was not needed."""
    verdict: Literal["kept", "broken", "missing", "not needed"]
    note: str = ""
    """What is missing and the command that measures it, or why nothing was needed."""

    @property
    def passes(self) -> bool:
        """Whether a promotion may go on."""
        return self.verdict in ("kept", "not needed")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a file asks for, by alias."""

    source: str
    """Where it was read from."""
    hash: str
    """Of what it says, not of how it is written: 16 hex digits."""
    requirements: Mapping[str, tuple[Requirement, ...]]


def read_requirement(text: str) -> Requirement:
    """Read one requirement, like `ppl_ratio<=1.10` or `round_trip==ok`.

    Raises:
        ConfigError: it cannot be read; its `picture` points at the place.
    """
    place = len(text) - len(text.lstrip())
    parts = []
    for pattern, what in ((_NAME, "a name"), (_OPERATOR, "one of <= >= == < >"), (_BOUND, "a number or a word")):
        match = pattern.match(text, place)
        if match is None:
            raise _unreadable(text, place, f"expected {what}")
        parts.append((match.group(), match.start()))
        place = len(text) - len(text[match.end() :].lstrip())
    if place < len(text):
        raise _unreadable(text, place, "expected the end: one requirement has one bound")
    (name, _), (sign, _), (written, at) = parts
    try:
        bound: Value = float(written)
    except ValueError:
        if sign != "==" or not re.fullmatch(r"[A-Za-z_][\w.\-]*", written):
            raise _unreadable(text, at, "expected a number") from None
        bound = written
    if isinstance(bound, float) and not math.isfinite(bound):
        raise _unreadable(text, at, "expected a finite number")
    return Requirement(name=name, operator=sign, bound=bound)


def read_policy(path: Path) -> Policy:
    """Read a policy file: for each alias, and for `monitor`, a list of requirements.

    Raises:
        ConfigError: it cannot be read, is empty, or holds something else.
    """
    content = read_yaml(path, "--policy")
    if not content or not all(isinstance(rows, list) and rows for rows in content.values()):
        raise ConfigError(
            f"{path} must give a list of requirements for each alias, like `champion: [ppl_ratio<=1.10]`, "
            f"got {content!r}"
        )
    found: dict[str, tuple[Requirement, ...]] = {}
    for alias, rows in content.items():
        check_alias(alias)
        wrong = [row for row in rows if not isinstance(row, str)]
        if wrong:
            raise ConfigError(f"{path}: {alias} must list requirements like ppl_ratio<=1.10, got {wrong[0]!r}")
        try:
            found[alias] = tuple(map(read_requirement, rows))
        except ConfigError as error:
            raise ConfigError(f"{path}: {alias}: {error}") from None
    plain = json.dumps({alias: [str(one) for one in rows] for alias, rows in found.items()}, sort_keys=True)
    return Policy(source=str(path), hash=hashlib.sha256(plain.encode()).hexdigest()[:16], requirements=found)


def required_of(policy: Policy, alias: str) -> tuple[Requirement, ...]:
    """What a policy asks of an alias.

    Raises:
        ConfigError: it says nothing of it.
    """
    if alias not in policy.requirements:
        near = difflib.get_close_matches(alias, policy.requirements, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"{policy.source} says nothing of {alias!r}; {hint}it has {', '.join(sorted(policy.requirements))}"
        )
    return policy.requirements[alias]


def check_alias(alias: str) -> None:
    """Raise ConfigError for what MLflow does not take as an alias, or takes as a version."""
    if not re.fullmatch(r"[A-Za-z_][\w-]{0,254}", alias) or re.fullmatch(r"v\d+|latest", alias, re.IGNORECASE):
        raise ConfigError(
            f"an alias must be letters, digits, - and _, begin with a letter, and be neither `latest` nor like v1; "
            f"got {alias!r}"
        )


def check_model_name(name: str) -> None:
    """Raise ConfigError for what MLflow or `models:/NAME@ALIAS` does not take as a model, or what a promotion needs."""
    # As long as the registry's column, with room for `.lock` and `/promotions`.
    if not re.fullmatch(r"\w(?:[\w.+ -]{0,238}[\w.+-])?", name) or name.endswith(".lock"):
        raise ConfigError(
            "the name of a registered model must be at most 240 letters, digits, spaces and . _ + -, begin with a "
            f"letter or a digit, and not end in a space or .lock; got {name!r}"
        )


def default_model_name(base_model: str) -> str:
    """What the pruned version of a model is called where nobody says, `org/name` -> `name-pruned`."""
    return f"{re.sub('[^A-Za-z0-9._+-]+', '-', Path(base_model).name).lstrip('.+-')[:200] or 'model'}-pruned"


def judge(
    requirements: Sequence[Requirement],
    measured: Mapping[str, Value],
    *,
    first: bool,
    how_to_measure: Callable[[str], str],
) -> list[Verdict]:
    """Hold measured values against requirements.

    Args:
        requirements: in the order in which they are shown.
        measured: by name; those relative to the champion are in it too.
        first: there is no champion, so nothing can be relative to it.
        how_to_measure: by name, what somebody does who wants the missing value.
    """
    return [_judged(one, measured, first, how_to_measure) for one in requirements]


def _judged(
    one: Requirement, measured: Mapping[str, Value], first: bool, how_to_measure: Callable[[str], str]
) -> Verdict:
    value = measured.get(one.name)
    verdict: Literal["kept", "broken", "missing", "not needed"]
    if value is not None:
        verdict, note = "kept" if one.holds(value) else "broken", ""
    elif first and one.name.startswith(VS_CHAMPION):
        verdict, note = "not needed", "there is no champion to compare with"
    else:
        verdict, note = "missing", how_to_measure(one.name)
    return Verdict(requirement=str(one), name=one.name, measured=value, verdict=verdict, note=note)


def _unreadable(text: str, place: int, expected: str) -> ConfigError:
    error = ConfigError(
        f"requirement {text!r} cannot be read: {expected} at character {place + 1}; write it like ppl_ratio<=1.10"
    )
    error.picture = f"    {text}\n    {' ' * place}^ {expected}"
    return error

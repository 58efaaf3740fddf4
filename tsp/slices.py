r"""Named parts of the text, measured one by one: what breaks in a pruned model is what is rare.

A YAML file maps names to one of three kinds:

    legal:    {file: "contracts/*"}            # files by their path; `*` also matches slashes
    german:   {field: {lang: de, year: 2024}}  # rows of .jsonl and .parquet by their fields, all of them equal
    numbers:  {regex: '\d{4,}'}                # paragraphs (text between blank lines) in which the pattern is found
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tsp.errors import ConfigError, DataError
from tsp.yaml12 import parse_yaml

KINDS = ("file", "field", "regex")
MAX_SLICES = 62
"""A token's slices are the bits of one int64."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a corpus."""

    text: str
    path: str
    """Of its file, with `/`; a module of the standard library has its dotted name with slashes, `email/message.py`."""
    fields: Mapping[str, Any]
    """Of its row; empty for a text file."""
    place: str = ""
    """File and line, for messages to the user."""
    is_chat: bool = False
    """The text is what the chat template made of the row's `messages`; its special tokens are in it."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A part of the text; exactly one of the three is given."""

    name: str
    file: str | None = None
    field: Mapping[str, Any] | None = None
    regex: re.Pattern[str] | None = None

    def holds(self, document: Document) -> bool:
        """Whether a whole document belongs to it; False for `regex`."""
        if self.file is not None:
            return fnmatchcase(f"/{document.path}", f"*/{self.file.lstrip('/')}")
        if self.field is not None:
            return all(key in document.fields and document.fields[key] == value for key, value in self.field.items())
        return False


def read_slices(path: str | None) -> tuple[Slice, ...]:
    """The slices of a YAML file; none without one.

    Raises:
        DataError: it is missing, no YAML, or says something else than the head of this module; all faults at once.
    """
    if path is None:
        return ()
    place = f"--slices {path}"
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"), place)
    except OSError as error:
        raise DataError(f"{place}: {error.strerror}") from None
    except (UnicodeDecodeError, ConfigError) as error:
        raise DataError(str(error) if isinstance(error, ConfigError) else f"{place}: no UTF-8: {error}") from None
    if not isinstance(content, dict) or not content:
        raise DataError(f"{place}: must map names to one of {', '.join(KINDS)}, got {_kind(content)}")
    if len(content) > MAX_SLICES:
        raise DataError(f"{place}: must have at most {MAX_SLICES} slices, got {len(content)}")
    faults = [f"{name}: {fault}" for name, given in content.items() if (fault := _fault(name, given))]
    if faults:
        raise DataError(f"{place}: {'; '.join(faults)}")
    return tuple(
        Slice(name=name, **({"regex": re.compile(given["regex"])} if "regex" in given else given))
        for name, given in content.items()
    )


def _fault(name: str, given: Any) -> str | None:
    """What is wrong with one slice; None: nothing."""
    # The name ends in the names of metrics, and those of MLflow allow no more.
    if not re.fullmatch(r"[\w.\- ]+", name):
        return "a name must be of letters, digits, '_', '-', '.' and spaces"
    if not isinstance(given, dict) or len(given) != 1 or not set(given) <= set(KINDS):
        got = ", ".join(map(str, given)) if isinstance(given, dict) else _kind(given)
        return f"must be exactly one of {', '.join(KINDS)}, got {got or 'nothing'}"
    ((kind, value),) = given.items()
    if not isinstance(value, dict if kind == "field" else str) or not value:
        return f"{kind} must be {'a mapping' if kind == 'field' else 'a text'}, got {value!r}"
    if kind == "regex" and isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            return f"regex {value!r} is no pattern: {error}"
    return None


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def token_marks(
    slices: Sequence[Slice], document: Document, num_tokens: int, offsets: Sequence[tuple[int, int]] | None
) -> list[int]:
    r"""The slices of each token of a document, as bits: `1 << i` for the i-th slice.

    Args:
        slices: all of them.
        document: whose tokens these are.
        num_tokens: of the document, special tokens included.
        offsets: first character of each token and the one after its last, as a fast tokenizer gives them; needed for
            `regex` only. A token belongs to the paragraph of its last character: blanks may lead, as in `\n\nword`.
    """
    of_document = sum(1 << bit for bit, one in enumerate(slices) if one.holds(document))
    marks = [of_document] * num_tokens
    patterns = [(bit, one.regex) for bit, one in enumerate(slices) if one.regex is not None]
    if not patterns:
        return marks
    assert offsets is not None, "a pattern needs them"
    spans = list(_paragraphs(document.text))
    starts = [start for start, _ in spans]
    found = [
        sum(1 << bit for bit, pattern in patterns if pattern.search(document.text[start:end])) for start, end in spans
    ]
    for token, (start, end) in enumerate(offsets):
        place = bisect_right(starts, end - 1) - 1
        # An empty token (the start of a text) stands in no paragraph, nor do the blank lines between two.
        if start < end and place >= 0 and end - 1 < spans[place][1]:
            marks[token] |= found[place]
    return marks


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """First character and the one after the last of each run of lines that are not blank."""
    start: int | None = None
    position = 0
    for line in text.split("\n"):
        if line.strip():
            start = position if start is None else start
        elif start is not None:
            yield start, position - 1
            start = None
        position += len(line) + 1
    if start is not None:
        yield start, len(text)
